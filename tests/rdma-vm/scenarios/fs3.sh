#: about three storage servers and a mount: written, read cold, a server killed in mid-write; TCP when asked for
#: topology many
#: needs system ff
#: limit 240
run() { system-tests --ignored --test-threads=1 --show-output "$@"; }
if [ -n "$TEST_FILTER" ]; then run "$TEST_FILTER"; exit; fi
run --exact files_move_by_rdma_and_outlive_a_storage_server_killed_in_mid_write \
    with_transport_tcp_nothing_moves_by_rdma
