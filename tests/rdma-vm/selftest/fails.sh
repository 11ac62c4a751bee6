#: about a test fails
#: topology veth
#: limit 20
echo "test it_passes ... ok"
echo "test it_fails ... FAILED"
exit 101
