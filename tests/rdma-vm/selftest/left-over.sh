#: about nothing that "hangs" left is there any more
#: topology veth
#: limit 20
if ps | grep -v grep | grep -q 'sleep 1000'; then exit 1; fi
echo "test no_process_is_left_of_an_earlier_scenario ... ok"
