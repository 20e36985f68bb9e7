#!/usr/bin/env bash
# The client on a Raspberry Pi, in Docker: look at the board, build the image, run.
#
#   ./run_pi.sh --server_address=192.168.1.10:8080 --cid=0 --model=Net
#   ./run_pi.sh --detach …      in the background, and again after a reboot or a crash
#   ./run_pi.sh --superlink=…   a SuperNode of Flower's engine instead (docs/engine.md)
#   ./run_pi.sh --help
#
# Any other 64-bit Arm board with Linux and Docker will do, and for trials a PC: there with
# DOCKER_BUILD_OPTIONS="--build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu"
[ -n "${BASH_VERSION-}" ] || exec bash "$0" "$@" # sh run_pi.sh
set -euo pipefail

# shellcheck source=plumbing/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/plumbing/launch.sh"

launcher=run_pi.sh
kind=cpu
device_help="--device auto|cpu          where to train; cuda is for ./run_jetson.sh"
image_mb=4000
build_time="about 10 minutes, half an hour on a Pi 3 or a Zero 2 W"

parse_arguments
check_arguments
[[ $device != cuda ]] ||
  die "--device cuda: this image trains on the CPU; on a Jetson use ./run_jetson.sh"
if [[ -n $superlink ]]; then
  # shellcheck source=plumbing/supernode.sh
  source "$root/plumbing/supernode.sh"
  kind=engine
  supernode_arguments
fi

# PyTorch has no packages for 32-bit Arm.
machine=$(uname -m)
case $machine in
  aarch64 | arm64 | x86_64) ;;
  armv*) die "this system has 32 bits ($machine), PyTorch needs 64; on a Pi 3, 4, 5 or Zero 2 W flash Raspberry Pi OS (64-bit)" ;;
  *) die "there is no image for this processor ($machine), only for 64-bit Arm and x86-64" ;;
esac
[[ $(getconf LONG_BIT) == 64 ]] ||
  die "a 64-bit kernel with a 32-bit system ($(getconf LONG_BIT)-bit programs), PyTorch needs 64; flash Raspberry Pi OS (64-bit)"

check_docker
[[ -z $superlink ]] || check_supernode_memory
# A Pi 3 shows about 900 MB, a Zero 2 W about 420. The system takes 200, a client of the
# smallest model up to 420.
check_memory 700
check_server
read_secret
make_images
[[ -z $superlink ]] || run_supernode
run_client
