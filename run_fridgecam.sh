#!/usr/bin/env bash
# FridgeCam on a fridge's computer: see fridgecam/README.md.
#
#   ./run_fridgecam.sh install --server_address 192.168.1.20:8080 --join join1_…
#   ./run_fridgecam.sh look ~/fridge/inbox
#   ./run_fridgecam.sh label | share on | share off | watch | model | model previous
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")"

python=$(plumbing/venv.sh base_images/light/requirements.txt)
exec "$python" -m fridgecam "$@"
