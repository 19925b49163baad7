"""Say lines on standard error and end badly: python -m tests.programs.fail STATUS LINE..."""

import sys

print(*sys.argv[2:], sep="\n", file=sys.stderr)
sys.exit(int(sys.argv[1]))
