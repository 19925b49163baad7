"""Work in the directory that is given, until standard input ends or has a line."""

import sys
from pathlib import Path

from hydra_jax.store import files

with files.exclusive(Path(sys.argv[1])):
    print("holding", flush=True)
    sys.stdin.readline()
