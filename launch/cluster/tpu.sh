#!/usr/bin/env bash
# A sweep on a TPU VM pod slice: starts the same command on every worker, from your machine, and shows what they say.
#
#   TPU=my-v5e-16 ZONE=us-west4-a bash launch/cluster/tpu.sh --config=configs/sweep.py:MODEL \
#       --workdir=/shared/runs/zero
#
# Variables: TPU and ZONE as in `gcloud compute tpus tpu-vm list`; DIRECTORY, where the repository is on every worker
# (default hydra_jax, of the home directory); PYTHON, to make .venv there (default python3, 3.11 to 13 is needed);
# COMMAND=launch.train trains instead.
#
# Assumed: gcloud is installed, logged in, and has a default project. You have brought the repository to all workers
# (git clone or rsync, by `gcloud compute tpus tpu-vm ssh` or `scp` with --worker=all). --workdir is an absolute path
# in a directory that is mounted on all of them (Filestore or other NFS; the network between them is open). The workers
# reach the package index, and the source of the model; their login shell is bash.
#
# Ctrl-C stops the sweep on all workers. After that, or when a spot slice was taken and is made anew, the same command
# goes on from the finished chunks. Run it in tmux where the connection may break.
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=launch/cluster/common.sh
source launch/cluster/common.sh

[ -n "${TPU:-}" ] && [ -n "${ZONE:-}" ] || fail "TPU and ZONE: are missing; set them to the slice's name and zone"
command -v gcloud >/dev/null || fail "gcloud: is not there; install the Google Cloud CLI"
workdir=$(workdir_of "$@")
[[ $workdir == /* ]] || fail "--workdir: is '$workdir'; give an absolute path that all workers share"

# on WORKERS COMMAND...: runs it on them, all at once.
on() {
  local workers=$1
  shift
  gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker="$workers" --batch-size=all \
    --command="$(printf '%q ' "$@")"
}

# function_on WORKERS NAME ARGUMENT...: runs a function of this script on them.
function_on() {
  local workers=$1 name=$2
  shift 2
  on "$workers" bash -c "$(declare -f "$name"); $name \"\$@\"" "$name" "$@"
}

claim() {
  mkdir -p "$1" && echo "$2" >"$1/.started"
}

process() {
  local workdir=$1 start=$2 directory=$3 python=$4 command=$5
  shift 5
  rm -f "${TMPDIR:-/tmp}/hydra_jax.pid"
  if [ "$(cat "$workdir/.started" 2>/dev/null)" != "$start" ]; then
    echo "error: --workdir: $(hostname) does not see $workdir of worker 0; give a directory that all share" >&2
    return 1
  fi
  if ! cd "$directory" || ! [ -f launch/environment.sh ]; then
    echo "error: DIRECTORY: there is no repository in $directory on $(hostname)" >&2
    return 1
  fi
  set -euo pipefail
  # shellcheck source=launch/environment.sh
  source launch/environment.sh
  PYTHON=$python
  environment
  python -m pip install --disable-pip-version-check --quiet "jax[tpu]"
  echo $$ >"${TMPDIR:-/tmp}/hydra_jax.pid"
  exec python -m "$command" --coordinator=auto "$@"
}

stop() {
  local pid="${TMPDIR:-/tmp}/hydra_jax.pid"
  if [ -f "$pid" ]; then kill -TERM "$(cat "$pid")"; fi
}

trap 'function_on all stop || true' INT TERM

start=$(date +%s)-$$
function_on 0 claim "$workdir" "$start" || fail "worker 0 of $TPU cannot be reached, or cannot write to $workdir"
function_on all process "$workdir" "$start" "${DIRECTORY:-hydra_jax}" "${PYTHON:-python3}" \
  "${COMMAND:-launch.sweep}" "$@" </dev/null &
await $!
