#: about an allreduce of two and of four ranks over verbs, for make test; "reduce" has the rest
#: topology veth
#: needs reduce
#: limit 120
#: fast yes
export FIREFLY_RDMA_DEVICES=rxe0,rxe1
reduce-rdma --ignored --test-threads=1 --show-output "${TEST_FILTER:-a_large_allreduce}"
