#!/usr/bin/env bash
# Set up this machine and pass the tests; other arguments go to pytest.
#   --fast    those that take seconds only, in under two minutes on two cores: what to run while working
#   --parity  those against PyTorch and transformers too
# Only tests marked `network` need the network, for a model that is fetched before them; -m "not network" leaves them out.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh

requirements=(tests/requirements.txt)
fetch=yes
arguments=()
for argument in "$@"; do
  case $argument in
    --parity) requirements+=(tests/parity/requirements.txt) ;;
    --fast)
      fetch=no
      arguments+=(-m "not slow and not network" --ignore=tests/parity)
      ;;
    *) arguments+=("$argument") ;;
  esac
done
environment "${requirements[@]}"
if [ "$fetch" = yes ]; then
  say "fetching the default model"
  python -m launch.fetch
fi
say "running the tests"
# Most of a test's time is one compiler thread: two to four at once, each with a file at a time, in conftest.py's order.
exec python -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder "${arguments[@]}"
