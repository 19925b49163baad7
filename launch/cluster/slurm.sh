#!/usr/bin/env bash
#SBATCH --job-name=hydra_jax
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@180
#
# A sweep under SLURM, on one node or several: one process a node, with all the GPUs that the job has there.
#
#   sbatch --nodes=4 --gpus-per-node=8 --cpus-per-task=32 --time=8:00:00 launch/cluster/slurm.sh \
#       --config=configs/sweep.py:MODEL --workdir=DIR
#
# The arguments before the script's name are sbatch's: add --partition, --account, --mem as your cluster wants them.
# Those after it are launch.sweep's; with COMMAND=launch.train before sbatch, launch.train's.
#
# Assumed: sbatch is called from the repository's root. That, --workdir and the model's cache (HYDRA_JAX_CACHE, by
# default in the home directory) are on file systems that all nodes share. .venv is made, with JAX for the GPUs in it:
# bash -c 'source launch/environment.sh && environment' && .venv/bin/pip install 'jax[cuda12]'. Where nodes have no
# internet, the model is fetched before: .venv/bin/python -m launch.fetch --model=MODEL.
#
# Three minutes before the time limit, and when a job of higher priority takes the nodes, the processes get SIGTERM and
# the job is put back into the queue; it goes on from the finished chunks. A sweep that fails is not started again, nor
# one that scancel ends.
set -euo pipefail

[ -n "${SLURM_JOB_ID:-}" ] || { echo "error: this is no SLURM job; start it with sbatch" >&2 && exit 1; }
[ -f launch/cluster/common.sh ] || { echo "error: $PWD is not the repository's root; call sbatch there" >&2 && exit 1; }
# shellcheck source=launch/cluster/common.sh
source launch/cluster/common.sh
[ -x .venv/bin/python ] || fail "there is no .venv; make it first, as this script's top says"
workdir=$(workdir_of "$@")
[ -n "$workdir" ] || fail "--workdir: is missing; give a directory that all nodes share"
PATH="$PWD/.venv/bin:$PATH"

# What runs on every node. Its parts are arguments, since the node sees no variables of this script.
process() {
  local mark=$1 status=0
  shift
  if [ ! -d "$mark" ]; then
    echo "error: --workdir: $(hostname) does not see ${mark%/*} of the first node; give a directory that all share" >&2
    return 255
  fi
  if [ -z "${JAX_LOCAL_DEVICE_IDS:-}" ] && [ "${SLURM_GPUS_ON_NODE:-0}" -gt 0 ]; then
    # Of several processes under SLURM, JAX gives each one GPU, unless it is told which.
    JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1)))
    export JAX_LOCAL_DEVICE_IDS
  fi
  trap : TERM # SLURM sends it to the command too, whose status is waited for
  "$@" || status=$?
  # The first that ends badly says why. The others are ended along with it, and SLURM may do that by SIGTERM: their 143
  # would look like a preemption.
  if [ "$status" -ne 0 ]; then (set -o noclobber && echo "$status" >"$mark/status") 2>/dev/null || true; fi
  return "$status"
}

mark=$workdir/.slurm-$SLURM_JOB_ID
rm -rf "$mark" # of a start before this one that was killed
mkdir -p "$mark"
trap 'rm -rf "$mark"; rmdir "$workdir" 2>/dev/null || true' EXIT

# srun would answer SIGTERM by killing the processes; scancel hands it on to them.
hand_on() { scancel --signal=TERM "$SLURM_JOB_ID" || true; }
cancelled=
trap hand_on USR1
trap 'cancelled=1; hand_on' TERM

echo "== job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)) on ${SLURM_JOB_NODELIST:-this node}: $*"
status=0
# --wait=0: process 0 may write tables and figures long after the others are done.
srun --kill-on-bad-exit=1 --wait=0 ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"} \
  bash -c "$(declare -f process); process \"\$@\"" process "$mark" python -m "${COMMAND:-launch.sweep}" "$@" &
await $! || status=$?
# Above 143, which is SIGTERM's, it is no process's own: out of memory, or the directory is not shared.
if [ "$status" -le 143 ] && [ -f "$mark/status" ]; then status=$(<"$mark/status"); fi

if [ "$status" -eq 143 ] && [ -z "$cancelled" ]; then
  echo "== stopped; back into the queue"
  scontrol requeue "$SLURM_JOB_ID" || fail "the job cannot be requeued; submit it again, it goes on where it was"
fi
exit "$status"
