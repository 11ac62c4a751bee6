#: about two machines reach each other; one is ended on request, the other passes
#: topology pair
#: limit 40
#: alone yes
if [ "$NODE" = 2 ]; then sleep 1000; fi
until ping -c 1 -W 1 10.1.0.2 >/dev/null; do sleep 0.1; done
echo "test reaches_the_other_machine ... ok"
touch "$SHARE/sync/kill-2"
until [ -e "$SHARE/sync/killed-2" ]; do sleep 0.1; done
! ping -c 1 -W 1 10.1.0.2 >/dev/null
echo "test the_other_machine_is_gone ... ok"
