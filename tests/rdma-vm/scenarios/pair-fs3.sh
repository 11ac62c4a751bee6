#: about files with copies on two machines, one of which loses its power in mid-write
#: topology pair
#: needs system ff
#: limit 180
#: alone yes
if [ "$NODE" = 2 ]; then
    until [ -e "$SHARE/sync/storage-4.toml" ]; do sleep 0.1; done
    exec ff serve --config "$SHARE/sync/storage-4.toml" --ready-file "$SHARE/sync/ready"
fi
system-tests --ignored --exact --test-threads=1 --show-output \
    pair::files_outlive_the_machine_that_holds_their_other_copies
