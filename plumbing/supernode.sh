# shellcheck shell=bash
# `run_pi.sh --superlink`: a SuperNode of Flower's engine in the container, in place of client.py.
# run_pi.sh sources this after launch.sh, which sets cid, superlink, …
# shellcheck disable=SC2154

# Flower, Python and PyTorch in three processes at most: measured on x86-64, see docs/engine.md.
supernode_mb=680

# Make flower-supernode's arguments of those of client.py; what neither knows goes on to Flower.
supernode_arguments() {
  local name value words config="cid='$cid'"
  set -- "${arguments[@]}"
  arguments=() certificates='' node_key=''
  while (($#)); do
    name=$1 value='' words=1
    case $1 in
      --*=*) name=${1%%=*} value=${1#*=} ;;
      --*) if (($# > 1)) && [[ $2 != --* ]]; then value=$2 words=2; fi ;;
    esac
    case ${name//-/_} in
      __cid | __data_dir) ;;
      __device)
        [[ $value == auto || $value == cpu ]] || die "--device '$value' is neither auto nor cpu"
        config+=" device='$value'"
        ;;
      __threads)
        [[ $value =~ ^[1-9][0-9]*$ ]] || die "--threads '$value' is not a whole number above 0"
        config+=" threads=$value"
        ;;
      __max_wait_seconds) arguments+=(--max-wait-time "$value") ;;
      __root_certificates) certificates=$value ;;
      __auth_supernode_private_key) node_key=$value ;;
      __model) die "--model: on Flower's engine the run names it: flwr run . --run-config \"model='$value'\"" ;;
      __node_config) die "--node-config is made of --cid, --data_dir, --device and --threads; give these" ;;
      __join | __join_only | __stay) die "$name is for server.py; a SuperNode has a registered key (docs/engine.md)" ;;
      *) arguments+=("${@:1:words}") ;;
    esac
    shift "$words"
  done
  [[ $data_dir != *\'* ]] ||
    die "--data_dir '$data_dir' has a quote in it, which Flower's node config cannot carry; rename it"
  if [[ -n $data_dir ]]; then
    config+=" data-dir='$data_dir'"
  else
    config+=" data-dir='/data' download=true" # CIFAR-10, once
  fi
  check_readable --root-certificates "$certificates"
  check_readable --auth-supernode-private-key "$node_key"
  arguments=(
    --superlink "$superlink" --node-config "$config"
    ${certificates:+--root-certificates /run/supernode/ca.crt}
    ${node_key:+--auth-supernode-private-key /run/supernode/key}
    "${arguments[@]}"
  )
}

# check_readable FLAG FILE
check_readable() {
  [[ -n $2 ]] || return 0
  [[ -f $2 ]] || die "$1 '$2' is no file on this device"
  [[ $(stat -c '%u %a' -- "$2") =~ ^1000\ |[4-7]$ ]] ||
    die "$1 '$2' cannot be read by user 1000, whom the SuperNode runs as; sudo chown 1000 '$2'"
}

check_supernode_memory() {
  local ram
  ram=$(meminfo MemTotal)
  ((ram >= 1400)) ||
    die "this board has $ram MB of RAM, and a SuperNode takes up to $supernode_mb MB beside the system: 1,500 MB are wanted; with server.py on the laptop, --server_address instead of --superlink takes less"
}

run_supernode() {
  set_options
  # Flower's own state and decoded images stay in the volume, too.
  mount_data_volume
  [[ -z $data_dir || $data_dir == synthetic* ]] || mount_read_only "$data_dir" "$data_dir"
  [[ -z $certificates ]] || mount_read_only "$(realpath -- "$certificates")" /run/supernode/ca.crt
  [[ -z $node_key ]] || mount_read_only "$(realpath -- "$node_key")" /run/supernode/key
  options+=(--entrypoint flower-supernode --no-healthcheck)
  run_container
}
