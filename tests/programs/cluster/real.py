"""Stand in for the virtual environment's Python: be the one that runs the tests."""

import os
import sys

os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
