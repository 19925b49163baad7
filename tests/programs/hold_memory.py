"""Hold so many bytes until they were measured, and end.

python -m tests.programs.hold_memory BYTES READY MEASURED [--drop]: it makes the file READY once it holds them, and
waits for the file MEASURED; with --drop it lives on for a moment without them.
"""

import sys
import time
from pathlib import Path

size, ready, measured = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
held = bytearray(b"x") * size
ready.touch()
while not measured.exists():
    time.sleep(0.01)
if "--drop" in sys.argv:
    del held
    time.sleep(0.1)
