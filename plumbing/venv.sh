#!/usr/bin/env bash
# Make .venv with what the given requirements files pin, unless it is there; print its Python.
#
#   python=$(plumbing/venv.sh requirements.txt tests/requirements.txt)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

stamp=.venv/installed-$(cat "$@" | cksum | tr ' ' '-')
if [[ ! -e $stamp ]]; then
  python=
  for candidate in python3 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null; then
      python=$candidate
      break
    fi
  done
  if [[ -z $python ]]; then
    echo "${0##*/}: needs Python 3.11 to 3.14, and finds none; python3 is $(python3 -V 2>&1)" >&2
    exit 1
  fi
  echo "setting up .venv with $("$python" -V) (once, takes some minutes)" >&2
  if [[ ! -x .venv/bin/pip ]] && ! "$python" -m venv .venv >&2; then
    rm -rf .venv
    echo "${0##*/}: cannot make a virtual environment; on Debian: sudo apt install python3-venv" >&2
    exit 1
  fi
  requirements=()
  for file in "$@"; do requirements+=(-r "$file"); done
  .venv/bin/pip install --quiet --disable-pip-version-check "${requirements[@]}" >&2
  touch "$stamp"
fi
echo "$root/.venv/bin/python"
