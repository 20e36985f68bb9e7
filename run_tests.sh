#!/usr/bin/env bash
# Set up, then check everything: style, types, shell scripts, Dockerfiles, tests. What takes a
# Docker Engine or Flower's is apart: tests/docker/run, tests/engine/run
#
#   ./run_tests.sh                                  all of it
#   ./run_tests.sh tests/plumbing/test_wire.py -x   arguments go to pytest
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")"

python=$(plumbing/venv.sh requirements.txt tests/requirements.txt)
bin=$(dirname "$python")
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
# What runs on a device, which may have Python 3.8; pyproject.toml has ruff look at the syntax.
"$bin/vermin" --quiet --no-tips --target=3.8- --no-eval-annotations \
  client.py torch_trainer.py utils.py federated/{errors,partitions,settings,updates}.py \
  plumbing/{addresses,board,cli,descriptors,files}.py \
  plumbing/security/{complaints,identity,keys}.py plumbing/stream/{device,wire}.py
"$bin/shellcheck" -x ./*.sh plumbing/*.sh deploy/*.sh .ci/run tests/*/run
"$bin/hadolint" Dockerfile base_images/*/Dockerfile
# Four at a time even on two cores: many tests only wait, for a timeout for example.
exec "$python" -m pytest --numprocesses=4 --dist=worksteal "$@"
