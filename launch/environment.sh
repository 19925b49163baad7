# shellcheck shell=bash
# Sourced by the other scripts: makes .venv and puts it first on PATH.

say() { printf '\n== %s\n' "$*"; }

# environment [FILE...]: installs requirements.txt and FILEs, unless exactly these are installed already.
environment() {
  local python=${PYTHON:-python3} file stamp
  if [ ! -x .venv/bin/python ]; then
    say "making a virtual environment in .venv"
    "$python" -m venv .venv
  fi
  PATH="$PWD/.venv/bin:$PATH"
  for file in requirements.txt "$@"; do
    stamp=".venv/installed-${file//\//-}"
    if ! cmp -s "$file" "$stamp"; then
      say "installing $file"
      python -m pip install --disable-pip-version-check --quiet --requirement "$file"
      cp "$file" "$stamp"
    fi
  done
}
