"""Stand in for SLURM's srun: start $TASKS tasks here.

As with SLURM's own, a task that ends badly has the others ended, and the worst status is that of all. With $AWAY, the
directory of that name is not there for the tasks.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

options = sys.argv[1 : sys.argv.index("bash")]
assert {"--kill-on-bad-exit=1", "--wait=0"} <= set(options), options
if away := os.environ.get("AWAY"):
    os.rename(away, f"{away}.away")
count = int(os.environ["TASKS"])
step = dict(SLURM_STEP_NUM_TASKS=count, SLURM_NTASKS=count, SLURM_STEP_NODELIST="localhost", SLURM_STEP_NUM_NODES=1)
tasks = [
    subprocess.Popen(
        sys.argv[1 + len(options) :],
        env=os.environ
        | {name: str(value) for name, value in step.items()}
        | {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)},
        start_new_session=True,
    )
    for number in range(count)
]
Path(os.environ["FAKES"], "tasks").write_text(" ".join(str(task.pid) for task in tasks))
while None in [task.poll() for task in tasks]:
    if any(task.returncode for task in tasks):
        for task in tasks:
            if task.poll() is None:
                os.killpg(task.pid, signal.SIGTERM)
                task.wait()
    time.sleep(0.05)
sys.exit(max(task.returncode if task.returncode >= 0 else 128 - task.returncode for task in tasks))
