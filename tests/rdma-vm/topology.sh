# The networks that scenarios run on. `up KIND` makes one, `down` removes whatever there is.
#
#   veth  two RDMA devices rxe0 (10.1.0.1) and rxe1 (10.1.0.2) on the two ends of a veth pair
#         d0-d1: packets really leave one and reach the other, so that delay, loss and a link that
#         is down can be had. One machine, one network namespace (rxe listens only in the first).
#         10.9.0.1 is an address that is not on the pair: TCP reaches it whatever happens there.
#   many  one RDMA device rxe0 with the addresses 10.1.0.1 and 10.1.0.11 to 10.1.0.14: a cluster of
#         that many nodes in one machine. Packets do not leave it: no delay or loss here.
#   pair  two machines on one wire, each with rxe0 on eth0, 10.1.0.1 and 10.1.0.2.

# So that RDMA moves 4096 bytes per packet: the largest that it knows, and its headers.
MTU=4200

up() {
    case $1 in
        veth)
            $IP link add d0 type veth peer name d1
            # The kernel must take packets from addresses that are its own, and each end answer for
            # its own address only.
            for dev in all default d0 d1; do
                echo 0 >/proc/sys/net/ipv4/conf/$dev/rp_filter
                echo 1 >/proc/sys/net/ipv4/conf/$dev/accept_local
            done
            for dev in d0 d1; do
                echo 1 >/proc/sys/net/ipv4/conf/$dev/arp_ignore
                echo 2 >/proc/sys/net/ipv4/conf/$dev/arp_announce
                $IP link set $dev mtu $MTU up
            done
            $IP addr add 10.1.0.1/24 dev d0
            $IP addr add 10.1.0.2/24 dev d1
            $IP addr add 10.9.0.1/32 dev lo
            add_rxe rxe0 d0 10.1.0.1 && add_rxe rxe1 d1 10.1.0.2 ;;
        many)
            $IP link add d0 type dummy
            $IP link set d0 mtu $MTU up
            for last in 1 11 12 13 14; do $IP addr add 10.1.0.$last/24 dev d0; done
            add_rxe rxe0 d0 10.1.0.14 ;;
        pair)
            $IP addr add 10.1.0.$NODE/24 dev eth0
            $IP link set eth0 mtu $MTU up
            add_rxe rxe0 eth0 10.1.0.$NODE ;;
    esac
}

# add_rxe DEVICE NETDEV ADDRESS: returns once the address has become one of the device's GIDs.
add_rxe() {
    $RDMA link add "$1" type rxe netdev "$2" || return 1
    gid=$(printf '0000:0000:0000:0000:0000:ffff:%02x%02x:%02x%02x' $(echo "$3" | tr . ' '))
    tries=0
    until cat /sys/class/infiniband/"$1"/ports/1/gids/* 2>/dev/null | grep -q "$gid"; do
        tries=$((tries + 1))
        [ $tries -lt 200 ] || { echo "$1 has no GID for $3"; return 1; }
        sleep 0.05
    done
}

down() {
    for device in /sys/class/infiniband/*; do
        [ ! -e "$device" ] || $RDMA link delete "$(basename "$device")"
    done
    $IP addr del 10.9.0.1/32 dev lo 2>/dev/null
    [ ! -e /sys/class/net/d0 ] || $IP link delete d0
    if [ -e /sys/class/net/eth0 ]; then
        $IP addr flush dev eth0
        $IP link set eth0 down
    fi
}
