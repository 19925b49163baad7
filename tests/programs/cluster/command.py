"""Stand in for the project's command: note how it was called, and end as $ENDINGS has it for this process."""

import json
import os
import signal
import sys
import time
from pathlib import Path

if "pip" in sys.argv:
    sys.exit()
fakes, number = Path(os.environ["FAKES"]), int(os.environ["SLURM_PROCID"])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
variables = {name: value for name, value in os.environ.items() if name.startswith(("SLURM_", "JAX_"))}
part = fakes / f"called-{number}.part"
part.write_text(json.dumps(dict(arguments=sys.argv[1:], variables=variables)))
part.rename(fakes / f"called-{number}")
deadline = time.monotonic() + 600
while len(list(fakes.glob("called-?"))) < int(os.environ["TASKS"]) and time.monotonic() < deadline:
    time.sleep(0.02)
ending = os.environ["ENDINGS"].split()[number]
if ending == "waits":
    time.sleep(600)
sys.exit(int(ending))
