#!/usr/bin/env bash
# Make .venv with what the given requirements files pin, unless it is there; print its Python.
#
#   python=$(plumbing/venv.sh requirements.txt tests/requirements.txt)
#   python=$(plumbing/venv.sh)       installs nothing: .venv's, or the one to make it with
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
torch_index=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}

die() {
  echo "${0##*/}: $*" >&2
  exit 1
}

# Print a Python of the system that can run this project.
find_python() {
  local candidate
  for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  die "needs Python 3.11 to 3.14, and finds none; python3 is $(python3 -V 2>&1)"
}

# check_disk MB: end if the packages will not fit
check_disk() {
  local free
  free=$(df -Pm . | awk 'NR == 2 { print $4 }')
  ((free >= $1)) || die "$free MB are free in $root, the packages need $1 MB; make room"
}

# install_cpu_torch PINS...: on x86-64, PyPI's PyTorch brings 6 GB of CUDA; PyTorch's own index
# has the same versions without.
install_cpu_torch() {
  [[ $(uname -sm) == "Linux x86_64" ]] && (($#)) || return 0
  if nvidia-smi -L 2>/dev/null | grep -q .; then
    echo "there is an NVIDIA GPU: PyTorch with CUDA, 7 GB" >&2
    check_disk 8000
  elif .venv/bin/python -c 'import sys, urllib.request as r; r.urlopen(sys.argv[1], timeout=5)' \
    "$torch_index/torch/" 2>/dev/null; then
    echo "no NVIDIA GPU: PyTorch for the CPU, from $torch_index" >&2
    check_disk 2000
    .venv/bin/python -m pip install --disable-pip-version-check --no-deps \
      --index-url "$torch_index" "$@" >&2
  else
    echo "$torch_index cannot be reached: PyTorch from PyPI instead, 7 GB with CUDA" >&2
    check_disk 8000
  fi
}

if (($# == 0)); then
  if [[ -x .venv/bin/python ]]; then echo "$root/.venv/bin/python"; else find_python; fi
  exit
fi

stamp=.venv/installed-$(cat "$@" | cksum | tr ' ' '-')
if [[ ! -e $stamp ]]; then
  python=$(find_python)
  echo "setting up .venv with $("$python" -V) (once, takes some minutes)" >&2
  mapfile -t pins < <(sed -nE 's/^(torch(vision)?==[^ #;]+).*/\1/p' "$@")
  check_disk $((${#pins[@]} ? 2000 : 500)) # a fridge's computer needs no torch
  if [[ ! -x .venv/bin/pip ]] && ! "$python" -m venv .venv >&2; then
    rm -rf .venv
    die "cannot make a virtual environment; on Debian: sudo apt install python3-venv"
  fi
  install_cpu_torch "${pins[@]}"
  requirements=()
  for file in "$@"; do requirements+=(-r "$file"); done
  .venv/bin/python -m pip install --disable-pip-version-check "${requirements[@]}" >&2
  touch "$stamp"
fi
echo "$root/.venv/bin/python"
