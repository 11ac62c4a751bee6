#: about no test runs, which is no success
#: topology veth
#: limit 20
echo "test result: ok. 0 passed"
