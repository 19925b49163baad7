"""Stand in for SLURM's scontrol: note what it is asked for."""

import os
import sys
from pathlib import Path

with Path(os.environ["FAKES"], "asked").open("a") as notes:
    notes.write(" ".join(sys.argv[1:]))
