#!/bin/sh
# Inside the machine: two Soft-RoCE devices on the two ends of a veth pair, so that packets really
# leave one and reach the other; then the tests.
set -e
cd /share
# By path: the shell would run busybox's own applets first, which know less.
ip=/usr/bin/ip
$ip link add d0 type veth peer name d1
# Both ends are in one network namespace (rxe listens only in the first), so the kernel must take
# packets from addresses that are its own.
for dev in all default d0 d1; do
    echo 0 >/proc/sys/net/ipv4/conf/$dev/rp_filter
    echo 1 >/proc/sys/net/ipv4/conf/$dev/accept_local
done
for dev in d0 d1; do
    echo 1 >/proc/sys/net/ipv4/conf/$dev/arp_ignore
    echo 2 >/proc/sys/net/ipv4/conf/$dev/arp_announce
    $ip link set $dev mtu 4200 up
done
$ip addr add 10.1.0.1/24 dev d0
$ip addr add 10.1.0.2/24 dev d1
/usr/bin/rdma link add rxe0 type rxe netdev d0
/usr/bin/rdma link add rxe1 type rxe netdev d1
# The addresses become GIDs a moment later.
n=0
until [ "$(cat /sys/class/infiniband/rxe1/ports/1/gids/1 2>/dev/null)" = 0000:0000:0000:0000:0000:ffff:0a01:0002 ]; do
    n=$((n + 1)); [ $n -lt 100 ] || { echo "no GID for rxe1"; exit 1; }
    sleep 0.1
done
ibv_devices

export FIREFLY_RDMA_DEVICES=rxe0,rxe1 FIREFLY_VERBS_LAYOUT=/share/layout.txt RUST_BACKTRACE=1
# One at a time: the machine has two slow processors.
filter=$(cat filter)
./net-tests verbs --include-ignored --test-threads=1 --nocapture ${filter:+"$filter"} || rc=$?
[ "${rc:-0}" = 0 ] || exit "$rc"
[ -z "$filter" ] || exit 0

# Once more where packets are late and get lost: retransmission is the device's, ordering ours.
echo "--- with 1 ms of delay and 1 % loss"
/usr/bin/tc qdisc add dev d0 root netem delay 1ms loss 1%
./net-tests verbs_ --include-ignored --test-threads=1 --nocapture
cat /sys/class/infiniband/rxe0/ports/1/hw_counters/completer_retry_err | sed 's/^/retries: /'
