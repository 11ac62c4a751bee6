#: about fs3 on a wire that delays, loses, and goes down in mid-write
#: topology veth
#: needs system ff
#: limit 240
run() { system-tests --ignored --test-threads=1 --show-output "$@"; }
if [ -n "$TEST_FILTER" ]; then run "$TEST_FILTER"; exit; fi
for dev in d0 d1; do $TC qdisc add dev $dev root netem delay 1ms loss 1%; done
run --exact faults::files_survive_delay_and_loss
for dev in d0 d1; do $TC qdisc del dev $dev root; done
run --exact faults::a_link_that_goes_down_in_mid_write_is_replaced_by_tcp_and_used_again_when_it_is_up
