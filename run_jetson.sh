#!/usr/bin/env bash
# The client on a Jetson, in Docker with its GPU: look at the board, build the image, run.
#
#   ./run_jetson.sh --server_address=192.168.1.10:8080 --cid=1 --model=Net
#   ./run_jetson.sh --detach …      in the background, and again after a reboot or a crash
#   ./run_jetson.sh --help
#
# With a JetPack that has no PyTorch for the client, or where that does not load, it hands over to
# run_pi.sh: CPU only.
[ -n "${BASH_VERSION-}" ] || exec bash "$0" "$@" # sh run_jetson.sh
set -euo pipefail

# shellcheck source=plumbing/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/plumbing/launch.sh"

launcher=run_jetson.sh
kind=gpu
device_help="--device auto|cpu|cuda     where to train (default: auto, the GPU if it works)"
image_mb=25000
build_time="up to an hour, most of it downloading"

parse_arguments
check_arguments

# The board: its L4T release decides which of NVIDIA's images has CUDA for it.
l4t=''
if [[ -r $board_root/etc/nv_tegra_release ]]; then
  read -r l4t <"$board_root/etc/nv_tegra_release" || true
  [[ $l4t =~ ^#\ R([0-9]+)\ .*REVISION:\ ([0-9]+) ]] && l4t=${BASH_REMATCH[1]}.${BASH_REMATCH[2]} || l4t=''
fi
if [[ -z $l4t ]]; then
  package=$(dpkg-query --show --showformat='${Version}' nvidia-l4t-core 2>/dev/null) || package=''
  [[ $package =~ ^([0-9]+)\.([0-9]+) ]] && l4t=${BASH_REMATCH[0]}
fi
[[ -n $l4t ]] ||
  die "this is no Jetson (no /etc/nv_tegra_release, no package nvidia-l4t-core); use ./run_pi.sh, which trains on the CPU"

# cpu WHY: train on the CPU here, unless the GPU was demanded
cpu() {
  [[ $device != cuda ]] || die "--device cuda: $1; leave --device out to train on the CPU"
  echo "$launcher: $1; training on the CPU" >&2
  set +x # a token may be among them
  exec "$root/run_pi.sh" "${original[@]}"
}
major=${l4t%.*} minor=${l4t#*.}
if ((major >= 38)); then # JetPack 7
  nvidia_image=nvcr.io/nvidia/pytorch:25.10-py3
elif ((major == 36 && minor >= 4)); then # JetPack 6.1
  nvidia_image=nvcr.io/nvidia/pytorch:25.06-py3-igpu
elif ((major == 36)); then
  cpu "L4T R$l4t is JetPack 6.0, the GPU needs JetPack 6.1 or later (L4T R36.4)"
elif ((major == 35)); then # JetPack 5, Python 3.8
  nvidia_image=nvcr.io/nvidia/l4t-pytorch:r35.2.1-pth2.0-py3
elif ((major == 32 && minor >= 6)); then # JetPack 4.6, Python 3.6
  nvidia_image=nvcr.io/nvidia/l4t-pytorch:r32.7.1-pth1.10-py3
else
  cpu "L4T R$l4t is older than JetPack 4.6 (R32.6), which has NVIDIA's last PyTorch for this board"
fi

check_docker
runtimes=$(docker info --format '{{json .Runtimes}}')
[[ $runtimes == *'"nvidia"'* ]] ||
  die "Docker lacks NVIDIA's runtime; sudo apt install nvidia-container && sudo nvidia-ctk runtime configure --runtime=docker && sudo systemctl restart docker"
# The GPU shares the board's memory: 420 MB for a client of the smallest model as on a CPU, and
# 1.5 GB for CUDA's libraries and the system.
check_memory 1900
check_server
read_secret
make_images
options=(--runtime nvidia --shm-size "$((ram / 4 < 8192 ? ram / 4 : 8192))m")
for group in video render; do # only root and these may open the GPU's device files
  if entry=$(getent group "$group"); then options+=(--group-add "$(cut -d: -f3 <<<"$entry")"); fi
done

# A driver or libraries that do not fit the image end PyTorch before the client could fall back.
if ! problem=$(docker run --rm "${options[@]}" "${run_options[@]}" --entrypoint python3 "$image" \
  -c 'import torch' 2>&1); then
  reason=$(grep 'Error' <<<"$problem" | tail -n 1) || true # Docker adds a line of advice
  cpu "PyTorch does not load in NVIDIA's image (${reason:-$problem})"
fi
run_client
