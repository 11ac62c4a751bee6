# In the machine, as its first process: runs each scenario of the plan on a network made afresh,
# and leaves its output, exit code and duration in the shared folder's out/.
#
# A scenario finds in its environment: NODE (this machine's number), TEST_FILTER, SHARE (the shared
# folder), IP, TC and RDMA (iproute2's commands: by their plain names the shell would run busybox's
# own applets, which know less), and in PATH the test binaries and ff; its working folder is empty.
NODE=$(sed -n 's/.*node=\([0-9]*\).*/\1/p' /proc/cmdline)
echo >"/share/sync/booted-$NODE"
mkdir -p /run/bin
# From memory: every page of a program would be fetched through the shared folder.
cp /share/bin/* /run/bin/ 2>/dev/null
export IP=/usr/bin/ip TC=/usr/bin/tc RDMA=/usr/bin/rdma
export NODE PATH=/run/bin:/bin:/usr/bin HOME=/run RUST_BACKTRACE=1 SHARE=/share
. /share/vm/topology.sh

uptime_s() { cut -d. -f1 /proc/uptime; }

while read -r name topology limit filter <&3; do
    out=/share/out/$name.$NODE
    began=$(uptime_s)
    (
        export TEST_FILTER=$filter
        mkdir -p /run/work && cd /run/work || exit 1
        up "$topology" || { echo "the network could not be made"; exit 1; }
        exec timeout -k 5 "$limit" sh -e "/share/vm/scenarios/$name.sh"
    ) >"$out.log" 2>&1 </dev/null 3<&-
    rc=$?
    # Whatever a scenario left running or mounted must not reach into the next one.
    kill -KILL -1 2>/dev/null
    awk '$3 ~ /^fuse/ {print $2}' /proc/mounts | while read -r at; do umount -l "$at"; done
    down >>"$out.log" 2>&1
    rm -rf /run/work /tmp/* /dev/shm/*
    echo $(($(uptime_s) - began)) >"$out.seconds"
    # Last: it says that the others are complete.
    echo "$rc" >"$out.rc.new" && mv "$out.rc.new" "$out.rc"
done 3</share/plan
