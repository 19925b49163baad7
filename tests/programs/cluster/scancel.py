"""Stand in for SLURM's scancel: hand SIGTERM on to the tasks that srun's stand-in has started."""

import os
import signal
import sys
from pathlib import Path

assert sys.argv[1:] == ["--signal=TERM", os.environ["SLURM_JOB_ID"]], sys.argv
for pid in Path(os.environ["FAKES"], "tasks").read_text().split():
    os.killpg(int(pid), signal.SIGTERM)
