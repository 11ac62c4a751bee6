#: about one of two machines fails, which ends the waiting of the other
#: topology pair
#: limit 600
#: alone yes
if [ "$NODE" = 2 ]; then sleep 1000; fi
echo "test it_passes ... ok"
exit 3
