#: about the power goes off in one of two machines while calls are on their way
#: topology pair
#: needs system
#: limit 120
#: alone yes
export SERVER=10.1.0.2:7703
run() { system-tests --ignored --exact --test-threads=1 --show-output "pair::$1"; }
if [ "$NODE" = 2 ]; then
    UNTIL=never run machine_two_serves
else
    run calls_to_a_machine_that_dies_end_with_an_error_and_those_to_others_go_on
fi
