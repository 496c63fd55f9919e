#!/bin/sh
# Two hosts in one: two network namespaces that see each other through a cable (veth), each with a torchrun of its own.
#
#     sudo examples/two_hosts.sh python examples/fsdp2.py --data 2
#
# What follows runs under torchrun on both, with 2 ranks each. Needs Linux, root and iproute2; removes the namespaces when done.
set -eu
[ "$#" -ge 2 ] || { echo "usage: $0 PYTHON SCRIPT [ARGUMENTS]" >&2; exit 2; }
python=$1
shift

first=cpcompile_a second=cpcompile_b
remove() {
    for space in $first $second; do
        ip netns del $space 2>/dev/null || true
        rm -rf /etc/netns/$space
    done
}
trap remove EXIT
remove
for space in $first $second; do
    ip netns add $space
    mkdir -p /etc/netns/$space # replaces files of /etc inside: names are found here, and no name server is asked
    printf '127.0.0.1 localhost\n10.77.0.1 %s\n10.77.0.2 %s\n' $first $second > /etc/netns/$space/hosts
    echo 'hosts: files' > /etc/netns/$space/nsswitch.conf
done
ip link add cable_a netns $first type veth peer name cable_b netns $second
for end in "$first cable_a 10.77.0.1" "$second cable_b 10.77.0.2"; do
    set -- $end "$@"
    ip -n "$1" addr add "$3/24" dev "$2"
    ip -n "$1" link set "$2" up
    ip -n "$1" link set lo up
    shift 3
done

run() { # namespace, interface, node rank, script and arguments
    space=$1 interface=$2 number=$3
    shift 3
    ip netns exec "$space" env GLOO_SOCKET_IFNAME="$interface" NCCL_SOCKET_IFNAME="$interface" \
        "$python" -m torch.distributed.run --nnodes 2 --nproc-per-node 2 --node-rank "$number" \
        --master-addr 10.77.0.1 --master-port 29500 "$@"
}
run $first cable_a 0 "$@" &
one=$!
run $second cable_b 1 "$@" > /dev/null
wait $one
