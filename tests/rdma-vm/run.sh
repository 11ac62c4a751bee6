#!/usr/bin/env bash
# Runs tests on real RDMA verbs: virtual machines (QEMU) boot a Debian kernel with Soft-RoCE
# (rdma_rxe) and run test binaries, which they see through a shared folder.
#
#   tests/rdma-vm/run.sh                  all scenarios
#   tests/rdma-vm/run.sh --fast           those of `make test`
#   tests/rdma-vm/run.sh NAME...          scenarios whose name contains a NAME
#   tests/rdma-vm/run.sh NAME/TEST        only tests whose name contains TEST, in those scenarios
#   tests/rdma-vm/run.sh --list           what there is
#
# Needs root (to install packages) and a Debian with its package archive. Knobs:
#   RDMA_VM_ACCEL   "tcg,thread=multi" or "kvm"; default: kvm only where the CPU really has it
#   RDMA_VM_SLOW    multiplies every time limit; default 1
#   RDMA_VM_APPEND  more parameters for the kernel
#
# Exit code: 0 passed, 1 something failed, 77 nothing could be tested (the reason is the last line,
# and in target/rdma-vm/why-not). README.md in this folder says how the parts fit.
#
# Everything made here lies under $CARGO_TARGET_DIR/rdma-vm (default target/rdma-vm) and is reused.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
work=${CARGO_TARGET_DIR:-$root/target}/rdma-vm
slow=${RDMA_VM_SLOW:-1}
scenarios=${RDMA_VM_SCENARIOS:-$here/scenarios}
# Until init runs, on a machine with other work; a quiet one takes a tenth of it.
boot_limit=$((90 * slow))
mkdir -p "$work"
rm -f "$work/why-not"

say() { printf 'rdma-vm: %s\n' "$*"; }
not_tested() { printf '%s\n' "$*" | tee "$work/why-not" >&2; exit 77; }
die() { printf 'rdma-vm: FAILED: %s\n' "$*" >&2; exit 1; }

# --- what there is to run -----------------------------------------------------------------------
# A scenario is a script for the machine, with its properties in lines that begin with "#:".
declare -A topology limit needs about fast alone test_filter
names=()
for file in "$scenarios"/*.sh; do
    name=$(basename "$file" .sh)
    names+=("$name")
    property() { sed -n "s/^#: $1 *//p" "$file"; }
    about[$name]=$(property about)
    topology[$name]=$(property topology)
    limit[$name]=$(property limit)
    needs[$name]=$(property needs)
    fast[$name]=$(property fast)
    alone[$name]=$(property alone)
    [ -n "${topology[$name]}" ] && [ -n "${limit[$name]}" ] || die "$file names no topology or no limit"
done

wanted=("${names[@]}")
case ${1:-} in
    --list)
        for name in "${names[@]}"; do
            printf '%-18s %-5s %4s s  %-5s %s\n' "$name" "${topology[$name]}" "${limit[$name]}" \
                "${fast[$name]:+fast}" "${about[$name]}"
        done
        exit 0 ;;
    --fast)
        wanted=()
        for name in "${names[@]}"; do [ -z "${fast[$name]}" ] || wanted+=("$name"); done ;;
    -*) die "unknown option $1 (--list, --fast)" ;;
    ?*)
        wanted=()
        for name in "${names[@]}"; do
            for filter in "$@"; do
                case $name in *"${filter%%/*}"*)
                    wanted+=("$name")
                    case $filter in */*) test_filter[$name]=${filter#*/} ;; esac
                    break ;;
                esac
            done
        done
        [ ${#wanted[@]} -gt 0 ] || die "no scenario is called like that; --list shows them" ;;
esac

# --- packages -----------------------------------------------------------------------------------
install_packages() {
    "$root/deploy/setup.sh" rdma >"$work/apt.log" 2>&1 ||
        not_tested "$(grep -v '^$' "$work/apt.log" | tail -1) (see $work/apt.log)"
}

# --- kernel: unpacked, never installed ----------------------------------------------------------
apt=(apt-get -q -o DPkg::Lock::Timeout=300 -o Acquire::Retries=2 -o Acquire::http::Timeout=30)
kernel=$work/kernel
fetch_kernel() {
    [ ! -e "$kernel/complete" ] || return 0
    rm -rf "$kernel" && mkdir -p "$kernel/deb"
    local meta=linux-image-6.12-amd64 image
    find_image() { apt-cache depends "$meta" 2>/dev/null | awk '/Depends: linux-image/ {print $2; exit}'; }
    image=$(find_image)
    [ -n "$image" ] || { "${apt[@]}" update >>"$work/apt.log" 2>&1 || true; image=$(find_image); }
    [ -n "$image" ] || not_tested "the package archive has no $meta (see $work/apt.log)"
    say "fetching $image"
    # The list of packages may be older than what the archive still keeps.
    (cd "$kernel/deb" && { "${apt[@]}" download "$image" ||
        { "${apt[@]}" update && "${apt[@]}" download "$(find_image)"; }; }) >>"$work/apt.log" 2>&1 || not_tested "cannot fetch $image (see $work/apt.log)"
    dpkg -x "$kernel"/deb/*.deb "$kernel"
    rm -rf "$kernel/deb"
    depmod -b "$kernel" "$(ls "$kernel/lib/modules")"
    touch "$kernel/complete"
}

install_packages
fetch_kernel
version=$(ls "$kernel/lib/modules")
initrd=$work/initrd-$version.gz
if [ ! -e "$initrd" ] || [ "$here/mkinitrd.sh" -nt "$initrd" ] || [ "$here/init" -nt "$initrd" ]; then
    "$here/mkinitrd.sh" "$kernel" "$here/init" "$initrd" || die "cannot make the initramfs"
fi

# --- what the scenarios run ---------------------------------------------------------------------
# test_binary NAME CARGO-ARGUMENTS...: the test executable that cargo makes of them, as NAME.
bin=$work/bin
test_binary() {
    local to=$bin/$1 path
    shift
    path=$(cd "$root" && cargo test -q "$@" --no-run --message-format=json |
        sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' | tail -1)
    [ -x "$path" ] || die "cargo test $* made no test binary"
    put "$path" "$to"
}
# Without symbols: the machine reads it through a slow file system. Line numbers of a panic stay.
put() { strip -o "$2" "$1"; }
rm -rf "$bin" && mkdir -p "$bin"
for need in $(for name in "${wanted[@]}"; do printf '%s\n' ${needs[$name]}; done | sort -u); do
    say "building $need"
    case $need in
        net) test_binary net-tests -p firefly-net --lib
            # The C header's layouts, for net to check its own declarations against.
            gcc -Wall -o "$work/layout" "$here/layout.c" || die "cannot compile layout.c"
            "$work/layout" >"$bin/layout.txt" ;;
        reduce) test_binary reduce-rdma -p firefly-reduce --test rdma
            test_binary reduce-determinism -p firefly-reduce --test determinism ;;
        system) test_binary system-tests -p firefly-tests --test rdma ;;
        ff) (cd "$root" && cargo build -q -p firefly-cli --bin ff) || die "ff does not build"
            put "${CARGO_TARGET_DIR:-$root/target}/debug/ff" "$bin/ff" ;;
        *) die "no such binary: $need" ;;
    esac
done

# --- machines -----------------------------------------------------------------------------------
# A kvm device alone proves little: some hosts offer one that cannot run a stock kernel.
if [ -n "${RDMA_VM_ACCEL:-}" ]; then accel=$RDMA_VM_ACCEL
elif grep -Eqw 'vmx|svm' /proc/cpuinfo && [ -w /dev/kvm ]; then accel=kvm
else accel=tcg,thread=multi; fi
cpu=max; [ "$accel" = kvm ] && cpu=host

declare -A machine # node -> pid of its qemu
end_machine() {
    [ -n "${machine[$1]:-}" ] || return 0
    kill -KILL "${machine[$1]}" 2>/dev/null || true
    wait "${machine[$1]}" 2>/dev/null || true
    unset "machine[$1]"
}
end_machines() { local node; for node in "${!machine[@]}"; do end_machine "$node"; done; }
trap end_machines EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

start_machine() { # NODE MEMORY CPUS QEMU-ARGUMENTS...
    local node=$1 memory=$2 cpus=$3
    shift 3
    # Should this script be killed without a word, the kernel ends its machines.
    setpriv --pdeathsig KILL qemu-system-x86_64 -nodefaults -no-user-config -nographic -serial stdio \
        -monitor none -no-reboot -m "$memory" -smp "$cpus" -accel "$accel" -cpu "$cpu" \
        -kernel "$kernel/boot/vmlinuz-$version" -initrd "$initrd" \
        -append "console=ttyS0 panic=-1 quiet loglevel=4 node=$node ${RDMA_VM_APPEND:-}" \
        -fsdev local,id=f0,path="$share",security_model=none \
        -device virtio-9p-pci,fsdev=f0,mount_tag=host0 "$@" \
        </dev/null >"$share/console-$node.log" 2>&1 &
    machine[$node]=$!
}

running() { [ -n "${machine[$1]:-}" ] && kill -0 "${machine[$1]}" 2>/dev/null; }

results=()
failed=0
# Prints what a scenario did, as its machines left it in $share/out.
report() { # NAME NODES
    local name=$1 nodes=$2 node base rc seconds=0 verdict=ok passed=0 why=()
    for node in $nodes; do
        base=$share/out/$name.$node
        passed=$((passed + $(cat "$base.log" 2>/dev/null | grep -cE '^test .* \.\.\. ok' || true)))
        # A scenario may have a machine killed; that one reports nothing.
        [ ! -e "$share/sync/killed-$node" ] || continue
        grep -E '^test .* \.\.\. (ok|FAILED|ignored)' "$base.log" 2>/dev/null | sed 's/^/  /' || true
        rc=$(cat "$base.rc" 2>/dev/null || echo none)
        case $rc in
            0) ;;
            none) why+=("machine $node reported no result") ;;
            143 | 137) why+=("machine $node: longer than its limit of ${limit[$name]} s") ;;
            *) why+=("machine $node: exit code $rc") ;;
        esac
        seconds=$(cat "$base.seconds" 2>/dev/null || echo "$seconds")
    done
    [ "$passed" -gt 0 ] || why+=("no test ran")
    if [ ${#why[@]} -gt 0 ]; then
        verdict=FAILED failed=1
        for node in $nodes; do
            printf '\n--- %s, machine %s: end of its output\n' "$name" "$node"
            tail -n 150 "$share/out/$name.$node.log" 2>/dev/null || true
            printf -- '--- end of its console\n'
            tail -n 20 "$share/console-$node.log" | tr -d '\033' || true
        done
        printf -- '--- %s\n\n' "${why[@]}"
    fi
    results+=("$(printf '%-18s %-6s %3d tests %4d s  %s' "$name" "$verdict" "$passed" "$seconds" "${why[*]:-}")")
    printf '%s\n' "${results[-1]}"
}

# Starts the machines of topology $kind, anew if they were there before.
start_machines() {
    end_machines
    rm -rf "$share"/{out,sync} && mkdir "$share"/{out,sync}
    start=$SECONDS booted=
    case $kind in
        veth | many) start_machine 1 2G 2 ;;
        pair)
            # Two machines on one wire: datagrams between two sockets.
            rm -f "$work"/wire-*.sock
            for node in $nodes; do
                start_machine "$node" 1G 1 \
                    -netdev "dgram,id=n0,local.type=unix,local.path=$work/wire-$node.sock,remote.type=unix,remote.path=$work/wire-$((3 - node)).sock" \
                    -device "virtio-net-pci,netdev=n0,host_mtu=4200,romfile=,mac=52:54:00:00:00:0$node"
            done ;;
    esac
}

# Whether the machines run their plan. An emulated processor under load makes a kernel panic once in
# some dozens of boots; nothing has been tested then, and they are booted again.
all_booted() {
    local node ended=
    for node in $nodes; do
        [ ! -e "$share/sync/booted-$node" ] || continue
        running "$node" && [ $((SECONDS - start)) -le "$boot_limit" ] || ended=$node
        booted=no
    done
    if [ -n "$ended" ]; then
        say "machine $ended did not boot:"
        tail -n 5 "$share/console-$ended.log" | tr -d '\033'
        boots=$((boots - 1))
        [ "$boots" -gt 0 ] || return 1
        start_machines
    fi
}

# Boots the machines of one topology and runs its scenarios in them.
run_topology() { # TOPOLOGY NAMES...
    local kind=$1 nodes=1 node start booted boots=3 deadline=0
    shift
    case $kind in
        veth | many) ;;
        pair) nodes='1 2' ;;
        *) die "there is no topology $kind" ;;
    esac
    # What a boot leaves behind stays until the next one of the same scenarios.
    share=$work/share-$kind
    [ -z "${alone[$1]}" ] || share=$work/share-$1
    rm -rf "$share" && mkdir -p "$share/vm"
    cp "$here"/{guest.sh,topology.sh} "$share/vm/"
    cp -r "$scenarios" "$share/vm/scenarios"
    cp -rl "$bin" "$share/bin"
    ln "$share/vm/guest.sh" "$share/run.sh"
    for name in "$@"; do
        printf '%s %s %s %s\n' "$name" "$kind" "$((${limit[$name]} * slow))" "${test_filter[$name]:-}"
        deadline=$((deadline + (${limit[$name]} + 20) * slow))
    done >"$share/plan"
    say "booting $version for topology $kind ($accel): $*"
    start_machines
    local pending=("$@") alive ready failed_at=
    while :; do
        if [ "$booted" != yes ]; then
            booted=yes
            all_booted || break
        fi
        # A scenario asks for a machine's sudden end by a file.
        for node in $nodes; do
            if [ -e "$share/sync/kill-$node" ] && [ ! -e "$share/sync/killed-$node" ]; then
                end_machine "$node"
                touch "$share/sync/killed-$node"
            fi
        done
        while [ ${#pending[@]} -gt 0 ]; do
            ready=1
            for node in $nodes; do
                [ -e "$share/out/${pending[0]}.$node.rc" ] || [ -e "$share/sync/killed-$node" ] || ready=
            done
            [ -n "$ready" ] || break
            report "${pending[0]}" "$nodes"
            pending=("${pending[@]:1}") failed_at=
        done
        # What one of two machines failed at, the other may wait for until its limit.
        if [ -z "$failed_at" ] && [ ${#pending[@]} -gt 0 ] &&
            grep -qsvx 0 "$share/out/${pending[0]}".?.rc; then failed_at=$SECONDS; fi
        if [ -n "$failed_at" ] && [ $((SECONDS - failed_at)) -gt $((10 * slow)) ]; then
            say "the machines are ended: one of them failed"
            break
        fi
        alive=
        for node in $nodes; do if running "$node"; then alive=1; fi; done
        [ -n "$alive" ] || break
        if [ $((SECONDS - start)) -gt $((boot_limit + deadline)) ]; then
            say "the machines are ended: they took longer than $((boot_limit + deadline)) s"
            break
        fi
        sleep 0.2
    done
    end_machines
    for name in "${pending[@]}"; do report "$name" "$nodes"; done
    say "topology $kind took $((SECONDS - start)) s"
}

# One boot for all scenarios of a topology, except for those that leave no machine to go on with.
for kind in veth many pair; do
    group=()
    for name in "${wanted[@]}"; do
        if [ "${topology[$name]}" = "$kind" ] && [ -z "${alone[$name]}" ]; then group+=("$name"); fi
    done
    [ ${#group[@]} -eq 0 ] || run_topology "$kind" "${group[@]}"
done
for name in "${wanted[@]}"; do
    [ -z "${alone[$name]}" ] || run_topology "${topology[$name]}" "$name"
done

printf '\nRDMA scenarios on %s:\n' "$version"
printf '  %s\n' "${results[@]}"
[ ${#results[@]} -eq ${#wanted[@]} ] || die "$((${#wanted[@]} - ${#results[@]})) scenarios did not run"
[ "$failed" = 0 ] || die "see above"
say "all passed"
