#: about a test never ends, nor does what it started
#: topology veth
#: limit 3
echo "test it_passes ... ok"
setsid sleep 1000 &
sleep 1000
