#: about one test passes
#: topology veth
#: limit 20
echo "test it_passes ... ok"
