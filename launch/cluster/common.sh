# shellcheck shell=bash
# Sourced by the other scripts of this directory.

fail() {
  echo "error: $*" >&2
  exit 1
}

# workdir_of ARGUMENT...: prints what --workdir is among them.
workdir_of() {
  while [ $# -gt 0 ]; do
    case $1 in
      --workdir=*) echo "${1#*=}" ;;
      --workdir) echo "${2:-}" ;;
    esac
    shift
  done
}

# await PID: its status. A trapped signal ends bash's `wait`, not the process.
await() {
  local status=0
  wait "$1" || status=$?
  while kill -0 "$1" 2>/dev/null; do
    status=0
    wait "$1" || status=$?
  done
  return "$status"
}
