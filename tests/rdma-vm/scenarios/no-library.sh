#: about the same binary works by TCP, and says why, where libibverbs is missing
#: topology many
#: needs system ff
#: limit 90
library=/usr/lib/x86_64-linux-gnu/libibverbs.so.1
mv $library /tmp/
trap 'mv /tmp/libibverbs.so.1 $library' EXIT
system-tests --ignored --test-threads=1 --show-output "${TEST_FILTER:-nolib::}"
