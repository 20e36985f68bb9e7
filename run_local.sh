#!/usr/bin/env bash
# A server and its clients on this machine, without Docker: set up, train, show the result.
#
#   ./run_local.sh                                  two clients, three rounds, Net
#   ./run_local.sh --rounds 5 --model ResNet18      arguments go to server.py
#   ./run_local.sh --secure                         with TLS, and keys for this run alone
#
# As many clients as --min_num_clients says. CIFAR-10 from --data_dir (default: data/),
# downloaded if it is not there; without Internet synthetic images, named as such. With
# --secure --keys DIR all keys stay in DIR, the clients' beside the server's.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
scratch=$(mktemp -d) # for its owner alone
pids=()

# Whatever ends this script ends the others: politely first, then for good.
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

clients=$(option min_num_clients 2 "$@")
model=$(option model Net "$@")
data_dir=$(option data_dir "$root/data" "$@")
address=$(option server_address "" "$@")
keys=$(option keys "$scratch/keys" "$@")
[[ $keys != \~/* ]] || keys=$HOME/${keys:2}
secure=''
if [[ ! $clients =~ ^[1-9][0-9]*$ ]]; then
  echo "run_local.sh: --min_num_clients $clients is no number of clients; say 1 or more" >&2
  exit 1
fi

python=$("$root/plumbing/venv.sh" requirements.txt)
for argument in "$@"; do
  case $argument in
    -h | --help) "$python" "$root/server.py" --help && exit ;;
    --secure) secure=yes ;;
  esac
done

if [[ $data_dir != synthetic* && ! -d $data_dir/train && ! -d $data_dir/cifar-10-batches-py ]]; then
  echo "fetching CIFAR-10 into $data_dir (170 MB, once)"
  code=0
  "$python" "$root/utils.py" --data_dir "$data_dir" >"$scratch/out" 2>&1 &
  pids=($!)
  wait "${pids[0]}" || code=$?
  pids=()
  problem=$(tail -n 1 "$scratch/out")
  if ((code == 3)); then
    echo "${problem#utils.py: }; going on with synthetic images"
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
if [[ -d $data_dir/train && -z $(option partition "" "$@") && $(option resume no "$@") == no ]]; then
  server+=(--partition iid) # a device's own images are used whole, but here all have one disk
fi
if [[ -n $secure ]]; then
  server+=(--keys "$keys")
  (umask 077 && "$python" "$root/server.py" devices token --keys "$keys" --uses "$clients" >"$scratch/token")
fi

export PYTHONUNBUFFERED=1
start server "$python" "$root/server.py" "${server[@]}"
for ((cid = 0; cid < clients; cid++)); do
  client=(--server_address "$address" --cid "$cid" --model "$model" --data_dir "$data_dir" --threads "$threads")
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
for _ in {1..50}; do # clients that were told of the end need a moment
  kill -0 "${pids[@]:1}" 2>/dev/null || break
  sleep 0.1
done
