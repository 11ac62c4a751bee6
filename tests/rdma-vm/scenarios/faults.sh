#: about fs3 on a wire that delays, loses, and goes down in mid-write
#: topology veth
#: needs system ff
#: limit 240
run() { system-tests --ignored --test-threads=1 --show-output "$@"; }
if [ -n "$TEST_FILTER" ]; then run "$TEST_FILTER"; exit; fi
run faults::a_link
# Last: it leaves the wire bad.
run faults::files_survive
