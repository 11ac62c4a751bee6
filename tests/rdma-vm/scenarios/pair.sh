#: about two machines agree on RDMA, and on TCP once one of them has lost its device
#: topology pair
#: needs system
#: limit 60
run() { system-tests --ignored --exact --test-threads=1 --show-output "pair::$1"; }
if [ "$NODE" = 2 ]; then
    SERVER=10.1.0.2:7701 UNTIL=rdma-done run machine_two_serves
    $RDMA link delete rxe0
    SERVER=10.1.0.2:7702 UNTIL=tcp-done run machine_two_serves
else
    SERVER=10.1.0.2:7701 run two_machines_agree_on_rdma
    touch "$SHARE/sync/rdma-done"
    SERVER=10.1.0.2:7702 run a_machine_without_a_device_is_reached_by_tcp
    touch "$SHARE/sync/tcp-done"
fi
