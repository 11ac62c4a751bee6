#: about the machine goes away in the middle
#: topology many
#: limit 20
#: alone yes
echo "test it_passes ... ok"
sync
echo o >/proc/sysrq-trigger
sleep 20
