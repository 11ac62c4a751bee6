#: about three storage servers and a mount: written, read cold, a server killed in mid-write; TCP when asked for
#: topology many
#: needs system ff
#: limit 240
system-tests --ignored --test-threads=1 --show-output "${TEST_FILTER:-fs3::}"
