#!/usr/bin/env bash
# The same run on Flower's engine, all on this machine: set up, train, show the result.
#
#   ./run_engine.sh                            two simulated nodes, three rounds, Net
#   ./run_engine.sh --nodes 100 --rounds 5     settings are those of server.py
#   ./run_engine.sh --superlink                a SuperLink and two SuperNodes
#   ./run_engine.sh --resume runs/DIR          continue a run, also one of server.py
#
# docs/engine.md describes the engine.
[ -n "${BASH_VERSION-}" ] || exec bash "$0" "$@" # sh run_engine.sh
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON-$("$root/plumbing/venv.sh" requirements.txt requirements-engine.txt)}
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m plumbing.engine "$@"
