#!/usr/bin/env bash
# Make the keys of a SuperLink and of its SuperNodes, in the directory keys.
#
#   deploy/keys.sh laptop.local kitchen garden
#
# laptop.local is the name, or the address, under which the SuperNodes reach the SuperLink, the
# others are SuperNodes. What is there already stays: run it again for further SuperNodes.
set -euo pipefail

if (($# == 0)) || [[ $1 == -* ]]; then
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
  exit 2
fi
host=$1
umask 077
mkdir -p keys
cd keys
new_key=(-newkey ec -pkeyopt ec_paramgen_curve:P-384 -noenc -days 3650)

if [[ ! -e ca.crt ]]; then
  openssl req -x509 "${new_key[@]}" -subj "/CN=flower-embedded" -keyout ca.key -out ca.crt \
    -addext keyUsage=critical,keyCertSign 2>/dev/null
fi
if [[ ! -e server.crt ]]; then
  [[ $host =~ ^[0-9.]+$|: ]] && name=IP:$host || name=DNS:$host
  openssl req -x509 "${new_key[@]}" -subj "/CN=$host" -CA ca.crt -CAkey ca.key \
    -keyout server.key -out server.crt -addext basicConstraints=critical,CA:FALSE \
    -addext "subjectAltName=$name,DNS:superlink,DNS:localhost,IP:127.0.0.1" 2>/dev/null
fi
for node in "${@:2}"; do
  [[ -e $node ]] || ssh-keygen -q -t ecdsa -b 384 -N "" -C "" -f "$node"
done
chmod 644 ca.crt server.crt -- *.pub
echo "in $PWD: ca.crt for all, server.crt and server.key for the SuperLink, and a key a SuperNode;"
echo "keep ca.key elsewhere"
