#!/usr/bin/env bash
# Set up this machine, fetch a real model and show its self-repair: a table and figures in runs/demo.
# Arguments go to the sweep, e.g. --config.prompts.limit=0 for all of the built-in facts.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh

environment
say "fetching the model"
python -m launch.fetch --model=smollm2-135m
say "ablating every layer of it, at the last token of factual prompts"
exec python -m launch.sweep --config=configs/sweep.py:smollm2-135m --config.prompts.limit=96 --workdir=runs/demo "$@"
