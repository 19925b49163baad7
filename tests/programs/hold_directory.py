"""Keep other runs out of a directory, until standard input has a line or ends.

python -m tests.programs.hold_directory DIRECTORY: it prints "holding" once it does.
"""

import sys
from pathlib import Path

from hydra_jax.store import files

with files.exclusive(Path(sys.argv[1])):
    print("holding", flush=True)
    sys.stdin.readline()
