"""Stand in for Google Cloud's gcloud: run here, one after the other, what it is to run on the workers of a TPU pod.

Workers have numbers in place of machines.
"""

import os
import subprocess
import sys

options = dict(argument.partition("=")[::2] for argument in sys.argv[1:] if argument.startswith("--"))
assert sys.argv[1:6] == ["compute", "tpus", "tpu-vm", "ssh", "pod"], sys.argv
assert options["--zone"] == "here"
workers = range(2) if options["--worker"] == "all" else [0]
command = ["bash", "-c", options["--command"]]
statuses = [subprocess.run(command, env=os.environ | {"SLURM_PROCID": str(n)}).returncode for n in workers]
sys.exit(max(status if status >= 0 else 128 - status for status in statuses))
