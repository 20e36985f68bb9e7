#!/usr/bin/env bash
# A server and its clients on this machine, without Docker: set up, train, show the result.
#
#   ./run_local.sh                                  two clients, three rounds, Net
#   ./run_local.sh --rounds 5 --model ResNet18      arguments go to server.py
#   ./run_local.sh --secure                         with TLS, and keys for this run alone
#   ./run_local.sh --fridgecam                      ten fridges, and what they see before and after
#   ./run_local.sh --resume runs/20260101-120000-Net   continue a run: its model, data, clients
#
# As many clients as --min_num_clients. CIFAR-10 from --data_dir (default: data/),
# downloaded if it is not there; without Internet synthetic images, named as such. With
# --secure --keys DIR all keys stay in DIR, the clients' beside the server's.
[ -n "${BASH_VERSION-}" ] || exec bash "$0" "$@" # sh run_local.sh
set -euo pipefail

if [[ ${1-} == --fridgecam ]]; then
  cd "$(dirname "${BASH_SOURCE[0]}")"
  python=$(plumbing/venv.sh requirements.txt fridgecam/requirements.txt)
  exec "$python" -m fridgecam story "${@:2}"
fi

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
command=$(printf %q "$0") # server.py prints it when it is interrupted, to be typed as it stands
[[ $0 == */* ]] || command="bash $command"
export RESUME_COMMAND="$command --resume"
scratch=$(mktemp -d) # for its owner alone
pids=()

# Whatever ends this script ends the others: by SIGTERM, and after 5 s by SIGKILL.
# shellcheck disable=SC2329 # called by the trap
stop_all() {
  trap '' INT TERM HUP
  ((${#pids[@]} == 0)) || kill "${pids[@]}" 2>/dev/null || true
  for _ in {1..50}; do
    [[ -n $(jobs -rp) ]] || break
    sleep 0.1
  done
  # shellcheck disable=SC2046 # one process number a word
  kill -KILL $(jobs -rp) 2>/dev/null || true
  wait 2>/dev/null || true
  rm -rf "$scratch"
}
trap stop_all EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

# option NAME DEFAULT ARGUMENT...: the value that the arguments give to --NAME
option() {
  local name=$1 value=$2
  shift 2
  while (($#)); do
    case ${1//-/_} in
      "__$name") value=${2-} ;;
      "__$name="*) value=${1#*=} ;;
    esac
    shift
  done
  printf '%s\n' "$value"
}

die() {
  echo "run_local.sh: $*" >&2
  exit 1
}

# absolute PATH: so that a run can be continued from any directory
absolute() {
  local path=$1
  [[ $path != \~/* ]] || path=$HOME/${path:2}
  [[ $path == /* ]] || path=$PWD/$path
  printf '%s\n' "$path"
}

# Everything that can be checked without Python is checked before it is set up.
for name in rounds epochs batch_size min_num_clients min_sample_size; do
  value=$(option "$name" 1 "$@")
  [[ $value =~ ^[1-9][0-9]{0,8}$ ]] || die "--$name '$value' is not a whole number above 0"
done
source "$root/plumbing/models.sh"
check_model "$(option model Net "$@")"
help='' secure='' resume='' run_dir=''
for ((i = 1; i <= $#; i++)); do
  next=$((i + 1))
  case ${!i} in
    -h | --help) help=yes ;;
    --secure) secure=yes ;;
    --resume=*) resume=yes run_dir=${!i#*=} ;;
    --resume)
      resume=yes run_dir=''
      if ((i < $#)) && [[ ${!next} != -* ]]; then run_dir=${!next}; fi
      ;;
  esac
done
if [[ -n $run_dir ]]; then
  run_dir=$(absolute "$run_dir")
  [[ -f $run_dir/config.json ]] || die "no run to resume in '$run_dir': it has no config.json"
fi

# So are all flags, by a Python without packages: these take minutes.
python=$("$root/plumbing/venv.sh")
PYTHONPATH=$root PYTHONDONTWRITEBYTECODE=1 "$python" -m plumbing.flags "$@" || exit
[[ -z $help ]] || exit 0

python=$("$root/plumbing/venv.sh" requirements.txt)

model=Net data_dir=$root/data clients=2 address='' keys=''
if [[ -n $resume ]]; then # with what the run had
  PYTHONPATH=$root "$python" -m plumbing.runs "$run_dir" >"$scratch/run" || exit
  {
    IFS= read -r run_dir
    IFS= read -r model
    IFS= read -r data_dir
    IFS= read -r clients
    IFS= read -r address
    IFS= read -r run_secure
    IFS= read -r keys
  } <"$scratch/run"
  secure=${secure:-$run_secure}
  # Only clients of this script can have been there, and the port may be another program's now.
  [[ $address != 127.0.0.1:* ]] || address=''
  if [[ -n $keys && ! (-d $keys && -O $keys) ]]; then
    keys='' # by default they are deleted when this script ends
    [[ -n $(option keys '' "$@") ]] || echo "the keys of this run are gone; its clients get new ones"
  fi
fi
model=$(option model "$model" "$@")
data_dir=$(option data_dir "$data_dir" "$@")
[[ $data_dir == synthetic* ]] || data_dir=$(absolute "$data_dir")
clients=$(option min_num_clients "$clients" "$@")
address=$(option server_address "$address" "$@")
keys=$(absolute "$(option keys "${keys:-$scratch/keys}" "$@")")

# Not into a folder with other things; the server reports what that folder lacks.
if [[ $data_dir != synthetic* && ! -d $data_dir/train && ! -d $data_dir/cifar-10-batches-py &&
  ($data_dir == "$root/data" || ! -d $data_dir || -z $(ls -- "$data_dir")) ]]; then
  [[ -z $resume ]] || die "no images in '$data_dir', where the run has them; bring them back, or name their new place with --data_dir"
  echo "fetching CIFAR-10 into $data_dir (170 MB, once)"
  code=0
  "$python" "$root/utils.py" --data_dir "$data_dir" >"$scratch/out" 2>&1 &
  pids=($!)
  wait "${pids[0]}" || code=$?
  pids=()
  problem=$(tail -n 1 "$scratch/out")
  if ((code == 3)); then
    echo "${problem#utils.py: }; using synthetic images"
    data_dir=synthetic
  elif ((code)); then
    echo "$problem" >&2
    exit "$code"
  fi
fi
if [[ -z $address || $address == *:0 ]]; then
  address=127.0.0.1:$("$python" -c 'import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])')
fi
cores=$("$python" -c 'import os; print(os.cpu_count() or 1)')
threads=$((cores > clients ? cores / clients : 1))

# start NAME COMMAND...: run it in the background, each of its lines behind its name
start() {
  local name=$1
  shift
  mkfifo "$scratch/$name"
  while IFS= read -r line; do printf '%-8s | %s\n' "$name" "$line"; done <"$scratch/$name" &
  "$@" >"$scratch/$name" 2>&1 &
  pids+=($!)
}

server=("$@" --server_address "$address" --data_dir "$data_dir")
if [[ -n $resume ]]; then
  server+=(--resume "$run_dir")
elif [[ -d $data_dir/train && -z $(option partition "" "$@") ]]; then
  server+=(--partition iid) # a device's own images are used whole, but here all have one disk
fi
# The server writes into a pipe, and would take nobody to be watching.
[[ ! -t 1 || -n $(option page "" "$@") ]] || server+=(--page on)
if [[ -n $secure ]]; then
  server+=(--keys "$keys")
  (umask 077 && "$python" "$root/server.py" devices token --keys "$keys" --uses "$clients" >"$scratch/token")
fi

export PYTHONUNBUFFERED=1
target=$address # 0.0.0.0 and [::] are where to listen, not where to go
case $address in
  0.0.0.0:*) target=127.0.0.1:${address##*:} ;;
  \[::\]:*) target="[::1]:${address##*:}" ;;
esac
start server "$python" "$root/server.py" "${server[@]}"
for ((cid = 0; cid < clients; cid++)); do
  client=(--server_address "$target" --cid "$cid" --model "$model" --data_dir "$data_dir" --threads "$threads")
  if [[ -z $secure ]]; then
    client+=(--insecure) # or it would use a key that this machine has for another server
  else
    client+=(--keys "$keys/client-$cid")
    [[ -e $keys/client-$cid/device-$cid.pem ]] || client+=(--join "$scratch/token")
  fi
  start "client $cid" "$python" "$root/client.py" "${client[@]}"
done

while kill -0 "${pids[0]}" 2>/dev/null; do
  for ((cid = 0; cid < clients; cid++)); do
    if ! kill -0 "${pids[cid + 1]}" 2>/dev/null && ! wait "${pids[cid + 1]}"; then
      sleep 0.5 # for its last lines
      echo "run_local.sh: client $cid ended before the run was over; stopping the others" >&2
      exit 1
    fi
  done
  sleep 0.2
done
wait "${pids[0]}" || exit
for _ in {1..50}; do # clients need a moment to end
  kill -0 "${pids[@]:1}" 2>/dev/null || break
  sleep 0.1
done
