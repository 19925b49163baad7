#!/usr/bin/env bash
# Set up this machine and pass the tests. With --parity, also those against PyTorch and transformers.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh

environment tests/requirements.txt
for argument in "$@"; do
  if [ "$argument" = --parity ]; then
    shift
    environment tests/parity/requirements.txt
  fi
done
say "fetching the default model"
python -m launch.fetch
say "running the tests"
# Most of a test's time is one compiler thread: two to four at once, each with a file at a time.
exec python -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile "$@"
