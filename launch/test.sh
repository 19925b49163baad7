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
exec python -m pytest "$@"
