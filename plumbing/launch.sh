# shellcheck shell=bash
# What run_pi.sh and run_jetson.sh share: arguments, checks, images, the container. Each sources
# this, sets the variables below, calls the functions in their order, and ends in run_client.

launcher=''     # the script's name, for messages
kind=''         # of the image: cpu, gpu or engine
device_help=''  # the line on --device
nvidia_image='' # what the gpu image is built on
image_mb=0      # free disk space that building the images takes
build_time=''   # how long that takes
options=()      # of docker run

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=plumbing/models.sh
source "$root/plumbing/models.sh"
board_root=${BOARD_ROOT-} # tests put a recorded board here

# The script's own arguments may hold a token, which stays out of a trace (bash -x).
traced=${-//[!x]/}
set +x
original=("$@")
[[ -z $traced ]] || set -x

usage() {
  cat <<END
$(example)

Builds the client's image if needed and runs client.py in it. Ctrl-C ends it.

  --detach                   in the background, and again after a reboot or a crash
  --server_address HOST:PORT where server.py runs
  --cid CID                  this device's name; 0, 1, … where the data set is partitioned
  --model MODEL              the server's: a name from utils.MODELS (default: Net), or mine:Mine for
                             your own class in mine.py in this directory, mounted read-only
  --data_dir DIR             this device's images, CIFAR-10 or train/<class>/*, mounted
                             read-only; or synthetic (default: CIFAR-10 in \$DATA_VOLUME,
                             downloaded once)
  $device_help
  --threads N                processor threads (default: auto, the fastest number)
  --max_wait_seconds S       give up after S s without server (default: never)
  --stay                     when the run is over, wait for the next; with --detach it does anyway
  --image NAME               use this image of the client, built elsewhere, and build none
  --join TOKEN|FILE|-        join a server with --secure, once: what server.py prints, or a file
                             with it or with a key of server.py devices admit, or standard
                             input (-), which no list of processes shows
  --join_only                join, and exit
  --self_test                train a little without a server, show what works here, and exit
  --insecure                 join a server without --secure, although there is a key

Environment:
  BASE_IMAGE                 pull this base image instead of building one
  DATA_VOLUME                volume or directory for downloaded data (default: flower-data)
  KEYS_VOLUME                volume or directory for the device's key (default: flower-keys)
  DOCKER_BUILD_OPTIONS       further words for docker build
  DOCKER_RUN_OPTIONS         further words for docker run
END
  [[ $kind != cpu ]] || cat <<END

A SuperNode of Flower's engine in place of client.py (docs/engine.md), with --cid, --data_dir,
--device and --threads as above, and flags of flower-supernode:

  ./$launcher --superlink=192.168.1.10:8000 --cid=0 --root-certificates=ca.crt \\
      --auth-supernode-private-key=key
END
}

example() {
  echo "./$launcher --server_address=192.168.1.10:8080 --cid=0 --model=Net"
}

die() {
  echo "$launcher: $*" >&2
  exit 1
}

warn() {
  echo "$launcher: warning: $*" >&2
}

# All arguments go on to client.py, --data_dir as an absolute path; --detach and --join stay here.
parse_arguments() {
  local - && set +x
  set -- "${original[@]}"
  server_address='' superlink='' cid='' model=Net data_dir='' device=auto detach='' arguments=()
  joins='' join='' join_only='' insecure='' ready='' self_test=''
  local name value words
  while (($#)); do
    name=$1 value='' words=1
    case $1 in
      -h | --help) usage && exit ;;
      --detach) detach=yes && shift && continue ;;
      --*=*) name=${1%%=*} value=${1#*=} ;;
      --*) if (($# > 1)) && [[ $2 != --* ]]; then value=$2 words=2; fi ;;
    esac
    case ${name//-/_} in
      __server_address) server_address=$value ;;
      __superlink)
        [[ -n $value ]] || die "--superlink lacks HOST:PORT, where flower-superlink listens"
        superlink=$value
        shift "$words" && continue
        ;;
      __cid) cid=$value ;;
      __model) model=$value ;;
      __device)
        # shellcheck disable=SC2034 # for the script that sources this
        device=$value
        ;;
      __insecure) insecure=yes ;;
      __join)
        [[ -n $value ]] ||
          die "--join lacks a token, a file or -; server.py --secure prints a token"
        joins=yes join=$value
        shift "$words" && continue
        ;;
      __image)
        [[ -n $value ]] || die "--image lacks the name of an image"
        ready=$value
        shift "$words" && continue
        ;;
      __join_only) join_only=yes && shift && continue ;;
      __self_test) self_test=yes ;;
      __keys) die "--keys: in its container the key is in the volume flower-keys; KEYS_VOLUME names another" ;;
      __data_dir)
        data_dir=$value
        if [[ $data_dir != synthetic* ]]; then
          [[ -d $data_dir ]] || die "--data_dir '$data_dir' is no directory on this device"
          data_dir=$(realpath --no-symlinks -- "$data_dir")
          arguments+=("--data_dir=$data_dir") && shift "$words" && continue
        fi
        ;;
    esac
    [[ " ${*:1:words}" != *[=\ ]join1_* ]] || die "a token goes after --join="
    arguments+=("${@:1:words}")
    shift "$words"
  done
}

check_arguments() {
  [[ -z $self_test ]] || server_address=none:1 cid=self_test # it needs neither
  if [[ -n $superlink ]]; then
    [[ $kind == cpu ]] || die "--superlink: a SuperNode trains on the CPU; use ./run_pi.sh"
    [[ -z $server_address ]] ||
      die "--server_address is for server.py, --superlink for Flower's engine; give one of them"
    server_address=$superlink
  fi
  [[ -n $server_address ]] || die "--server_address is missing; for example: $(example)"
  [[ -n $cid ]] ||
    die "--cid is missing, this device's own number or name; for example: $(example)"
  [[ $cid =~ ^[A-Za-z0-9._][A-Za-z0-9._-]{0,63}$ ]] ||
    die "--cid '$cid' is not made of 1 to 64 letters, digits, '.', '_' and '-', with no '-' in front"
  [[ $server_address != *://* ]] ||
    die "server address '$server_address' begins with the name of a protocol; leave it out: ${server_address#*://}"
  [[ $server_address =~ ^(\[([0-9A-Fa-f:.]+[^][:space:]/]*)\]|([^][:space:]/:]+)):([0-9]+)$ ]] ||
    die "server address '$server_address' is not HOST:PORT; examples: 192.168.1.10:8080, laptop.local:8080"
  host=${BASH_REMATCH[2]}${BASH_REMATCH[3]} port=${BASH_REMATCH[4]}
  [[ $host != 0.0.0.0 && $host != :: ]] ||
    die "server address '$server_address' stands for all addresses of the machine that listens, and none to go to; use the one that server.py prints"
  check_model "$model"
  [[ -z $joins || -z $insecure ]] ||
    die "--join is for a server with --secure; leave out --insecure"
  [[ -z $join_only || -n $joins ]] || die "--join_only needs --join"
  keys=${KEYS_VOLUME:-flower-keys}
  if [[ $keys == */* ]]; then
    (umask 077 && mkdir -p -- "$keys")
    [[ $(stat -c '%u %a' -- "$keys") =~ ^1000\ [0-7]?700$ ]] ||
      die "KEYS_VOLUME '$keys' must belong to user 1000, whom the client runs as, and be closed to others; sudo chown 1000 '$keys' && sudo chmod 700 '$keys'"
  fi
  read -ra build_options <<<"${DOCKER_BUILD_OPTIONS-}"
  read -ra run_options <<<"${DOCKER_RUN_OPTIONS-}"
}

check_docker() {
  local versions problem arch version client
  command -v docker >/dev/null ||
    die "Docker is not installed; curl -fsSL https://get.docker.com | sudo sh && sudo usermod -aG docker \$USER, then log out and in"
  if ! versions=$(docker version --format '{{.Server.Arch}} {{.Server.Version}} {{.Client.Version}}' 2>/dev/null); then
    problem=$(docker version 2>&1 >/dev/null) || true
    [[ $problem != *"permission denied"* ]] ||
      die "user $(id -un) may not use Docker; sudo usermod -aG docker \$USER, then log out and in"
    die "Docker does not run (${problem%%$'\n'*}); sudo systemctl enable --now docker"
  fi
  read -r arch version client <<<"$versions"
  [[ $arch != arm ]] ||
    die "Docker has 32 bits ($arch) on a 64-bit kernel; install Docker for arm64, on a Pi with Raspberry Pi OS (64-bit)"
  # Before 20.10.10 Docker's seccomp profile forbids clone3, and no program in Debian 12 can
  # start a thread: https://github.com/docker-library/python/issues/835
  printf '%s\n' 20.10.10 "$version" | sort -VC ||
    die "Docker $version is older than 20.10.10, the first that runs Debian 12 images; sudo apt update && sudo apt upgrade"
  # From 23.0 on the docker command leaves BuildKit to a plugin, which Debian and Ubuntu package
  # apart from docker.io. The builder from before does as well.
  export DOCKER_BUILDKIT=1
  if printf '%s\n' 23.0 "$client" | sort -VC && ! docker buildx version >/dev/null 2>&1; then
    DOCKER_BUILDKIT=0
  fi
}

# check_memory NEEDED: warn where the system and PyTorch want more MB than the board has. What a
# model adds to that the client measures itself.
check_memory() {
  local needed=$1 gb swap problem
  ram=$(meminfo MemTotal) swap=$(meminfo SwapTotal)
  ((ram < needed)) || return 0
  problem="$ram MB of RAM and $swap MB of swap, the system and PyTorch want $needed MB"
  if ((swap >= needed)); then
    warn "$problem: it will swap, and be slow"
  else
    gb=$(((needed + 999) / 1000))
    warn "$problem, so it may be killed; add swap: sudo fallocate -l ${gb}G /swap && sudo chmod 600 /swap && sudo mkswap /swap && sudo swapon /swap"
  fi
}

meminfo() {
  awk -v name="$1:" '$1 == name { mb = $2 / 1024 } END { print int(mb) }' "$board_root/proc/meminfo"
}

# The server may be started later: only a warning.
check_server() {
  [[ -z $self_test ]] || return 0
  local program=${superlink:+flower-superlink}
  program=${program:-server.py}
  # shellcheck disable=SC2016 # the inner bash puts in host and port
  if [[ $host =~ ^(localhost|127\..*|::1)$ && " ${run_options[*]} " != *[\ =]host\ * ]]; then
    warn "$host is the container itself; take the address that server.py prints"
  elif ! timeout 3 bash -c '</dev/tcp/"$0"/"$1"' "$host" "$port" 2>/dev/null; then
    warn "no answer from $server_address yet; the client will wait (is $program running there, is the port open in its firewall?)"
  fi
}

# What the device joins with: asked for before images are built.
read_secret() {
  local - && set +x
  local file=$join
  secret=''
  [[ -n $joins ]] || return 0
  [[ $file != \~/* ]] || file=$HOME/${file:2}
  if [[ $join == - && -t 0 ]]; then
    read -rsp "token (not shown): " secret || true
    echo >&2
  elif [[ $join == - ]]; then
    secret=$(cat)
  elif [[ $join == join1_* ]]; then
    secret=$join
    [[ ! $secret =~ [[:space:]] ]] ||
      die "the token of --join has spaces or line breaks; leave them out"
  elif [[ -f $file && -r $file ]]; then
    secret=$(<"$file")
  fi
  [[ $secret == *join1_* || $secret == *"PRIVATE KEY"* ]] ||
    die "--join is neither a token (join1_…, as server.py prints it) nor a file with one or with a key; - reads standard input"
}

# The base image is pulled, or built where its files have changed since; the client's is built
# each time, from Docker's cache where nothing changed.
make_images() {
  local base=flower-embedded-base:$kind problem
  if [[ -n $ready ]]; then
    image=$ready
    docker image inspect "$image" >/dev/null 2>&1 && return
    check_disk
    echo "pulling $image"
    docker pull "$image" || die "no image '$image' here, and it cannot be pulled; check its name, or load it: docker save $image | ssh BOARD docker load"
    return
  fi
  image=flower-embedded:$kind
  if [[ -z ${BASE_IMAGE-} ]]; then
    build_bases
  elif base=$BASE_IMAGE && ! docker image inspect "$base" >/dev/null 2>&1; then
    check_disk
    echo "pulling $base, once"
    docker pull "$base" || die "cannot pull BASE_IMAGE '$base'; check its name and the network"
  fi
  if ! problem=$(docker build --quiet --tag "$image" --build-arg "BASE_IMAGE_TYPE=$kind" \
    --build-arg "BASE_IMAGE=$base" "${build_options[@]}" "$root" 2>&1); then
    echo "$problem" >&2
    die "building $image failed, the lines above give the reason"
  fi
}

# The engine's base is built on the client's.
build_bases() {
  local checksum=''
  if [[ $kind == engine ]]; then
    build_base cpu ''
    build_base engine flower-embedded-base:cpu
  else
    build_base "$kind" "$nvidia_image"
  fi
}

# build_base KIND IMAGE: build it on IMAGE, unless that was done from the same files.
build_base() {
  local base=flower-embedded-base:$1 from=$2 files built
  files=$(cd "$root/base_images" && find . "./$1" -maxdepth 1 -type f ! -name '*.md' -exec sha256sum {} + | LC_ALL=C sort)
  checksum=$(sha256sum <<<"${checksum:+$checksum }${from:+$from }$files") checksum=${checksum:0:16}
  built=$(docker image inspect --format '{{index .Config.Labels "flower-embedded.base"}}' "$base" 2>/dev/null) || built=''
  [[ $built != "$checksum" ]] || return 0
  check_disk
  echo "building $base${from:+ on $from}, once: $build_time"
  docker build --tag "$base" --label "flower-embedded.base=$checksum" \
    ${from:+--build-arg "BASE=$from"} \
    --file "$root/base_images/$1/Dockerfile" "${build_options[@]}" "$root/base_images" ||
    die "building $base failed, its last lines give the reason; start again when that is fixed"
}

check_disk() {
  local docker_root free
  docker_root=$(docker info --format '{{.DockerRootDir}}')
  free=$(df --output=avail --block-size=MB -- "$docker_root" 2>/dev/null | tail -n 1) || free=''
  free=${free//[!0-9]/}
  ((${free:-$image_mb} >= image_mb)) ||
    die "$free MB are free in $docker_root, the image needs $image_mb MB while it is built; make room (docker system prune, sudo apt clean) or take a larger card"
}

# mount_option VOLUME_OR_DIRECTORY TARGET: the value of docker's --mount, which is a line of CSV
mount_option() {
  local source=$1
  if [[ $source == */* ]]; then
    source=$(realpath --no-symlinks -- "$source") source=${source//\"/\"\"}
    printf 'type=bind,"source=%s",target=%s' "$source" "$2"
  else
    printf 'type=volume,source=%s,target=%s' "$source" "$2"
  fi
}

# The options of the client's container, and of the one that joins.
set_options() {
  local found
  options=(
    --init
    --log-driver json-file --log-opt max-size=10m --log-opt max-file=3
    --cap-drop ALL --security-opt no-new-privileges
    "${options[@]}"
  )
  if [[ -r $board_root/proc/device-tree/model ]]; then # hidden inside a container
    options+=(--env "DEVICE_MODEL=$(tr -d '\0' <"$board_root/proc/device-tree/model")")
  fi
  # What a SuperLink sends runs beside the SuperNode, and shall not find the key of the stream.
  [[ -n $superlink ]] || options+=(--mount "$(mount_option "$keys" /keys)")
  if [[ $host == *.local ]]; then # multicast DNS works out here, not in a container
    if found=$(getent ahostsv4 "$host"); then
      options+=(--add-host "$host:${found%% *}")
    else
      warn "cannot find $host from here; take the IP address that server.py prints"
    fi
  fi
}

# Joining is another container's work, which gets the secret by its standard input: the
# arguments of the one that stays can be looked up for as long as it is there.
join_server() {
  local - && set +x
  printf '%s\n' "$secret" |
    docker run --name "flower-join-$cid" "${options[@]}" "${run_options[@]}" \
      --restart no --rm --interactive "$image" "${arguments[@]}" --join=- --join_only
}

run_client() {
  local own
  set_options
  [[ -z $joins ]] || join_server || exit
  [[ -z $join_only ]] || exit 0
  if [[ -n $data_dir && $data_dir != synthetic* ]]; then
    mount_read_only "$data_dir" "$data_dir"
  else
    mount_data_volume
  fi
  if [[ $model == *:* ]]; then # into the client's working directory
    own=$(model_file "$model")
    mount_read_only "$(realpath -- "$own")" "/app/$own"
  fi
  run_container
}

mount_read_only() {
  options+=(--mount "type=bind,\"source=${1//\"/\"\"}\",\"target=${2//\"/\"\"}\",readonly")
}

mount_data_volume() {
  if [[ ${DATA_VOLUME-} == */* ]]; then
    mkdir -p -- "$DATA_VOLUME"
    [[ $(stat -c %u -- "$DATA_VOLUME") == 1000 ]] ||
      warn "the client is user 1000 in its container and may not write to '$DATA_VOLUME'; sudo chown 1000 '$DATA_VOLUME'"
  fi
  options+=(--mount "$(mount_option "${DATA_VOLUME:-flower-data}" /data)")
}

run_container() {
  local container=flower-client-$cid state
  if state=$(docker container inspect --format '{{.State.Status}}' "$container" 2>/dev/null); then
    echo "replacing the container $container ($state)"
    docker rm --force --volumes "$container" >/dev/null
  fi
  if [[ -n $detach ]]; then
    options+=(--detach --restart unless-stopped)
    echo "$container runs in the background, again after a reboot or a crash, and joins each run"
    echo "  its log:  docker logs --follow $container"
    echo "  stop it:  docker stop $container       start it again: docker start $container"
    echo "  remove:   docker rm --force $container"
  else
    options+=(--rm)
    if [[ -t 0 && -t 1 ]]; then options+=(--interactive --tty); fi
  fi
  set -- "${arguments[@]}"
  exec docker run --name "$container" "${options[@]}" "${run_options[@]}" "$image" "$@"
}
