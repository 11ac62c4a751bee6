#: about reduce's groups over verbs: 2 and 4 ranks, the bits of TCP, a death in mid-transfer
#: topology veth
#: needs reduce
#: limit 400
export FIREFLY_RDMA_DEVICES=rxe0,rxe1
run() { "$@" --include-ignored --test-threads=1 --show-output; }
run reduce-rdma $TEST_FILTER
[ -z "$TEST_FILTER" ] || exit 0

echo "--- the tests of determinism, with every rank of another node reached by RDMA"
FIREFLY_TRANSPORT=rdma run reduce-determinism bf16 callbacks
