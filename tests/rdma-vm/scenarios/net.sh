#: about net's link, RPC and channel tests over verbs, once more with delay and loss
#: topology veth
#: needs net
#: limit 240
#: fast yes
export FIREFLY_RDMA_DEVICES=rxe0,rxe1 FIREFLY_VERBS_LAYOUT=$SHARE/bin/layout.txt
ibv_devices
# Those that are ignored elsewhere, one at a time: the machine has two slow processors.
run() { net-tests --ignored --test-threads=1 --show-output "$@"; }
if [ -n "$TEST_FILTER" ]; then run "$TEST_FILTER"; exit; fi
run

# Retransmission is the device's affair, ordering ours.
echo "--- with 1 ms of delay and 1 % loss"
$TC qdisc add dev d0 root netem delay 1ms loss 1%
run verbs_keep verbs_carry
retries=$(cat /sys/class/infiniband/rxe0/ports/1/hw_counters/completer_retry_err)
echo "retries: $retries"
