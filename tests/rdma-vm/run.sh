#!/usr/bin/env bash
# Runs net's RDMA tests on real verbs: a virtual machine (QEMU) boots a Debian kernel with
# Soft-RoCE (rdma_rxe) and runs the test binary, which it sees through a shared folder.
#
#   tests/rdma-vm/run.sh                 all RDMA tests
#   tests/rdma-vm/run.sh NAME            those whose name contains NAME
#
# Needs root (to install packages) and a Debian with its package archive. Knobs:
#   RDMA_VM_ACCEL   "tcg,thread=multi" or "kvm"; default: kvm only where the CPU really has it
#   RDMA_VM_LIMIT   seconds until the machine is ended; default 420
#
# Everything made here lies under $CARGO_TARGET_DIR/rdma-vm (default target/rdma-vm) and is reused.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
work=${CARGO_TARGET_DIR:-$root/target}/rdma-vm
filter=${1:-}
limit=${RDMA_VM_LIMIT:-420}
mkdir -p "$work"

say() { printf 'rdma-vm: %s\n' "$*"; }
die() { printf '\nrdma-vm: FAILED: %s\n\n' "$*" >&2; exit 1; }

# --- packages -----------------------------------------------------------------------------------
packages=(qemu-system-x86 busybox-static cpio kmod iproute2 xz-utils gcc libc6-dev
          libibverbs1 libibverbs-dev ibverbs-providers ibverbs-utils)
missing=()
for p in "${packages[@]}"; do
    dpkg-query -W -f='${Status}' "$p" 2>/dev/null | grep -q 'install ok installed' || missing+=("$p")
done
apt=(apt-get -o DPkg::Lock::Timeout=300 -q)
updated=
update() { [ -n "$updated" ] || { "${apt[@]}" update >"$work/apt.log" 2>&1; updated=1; }; }
if [ ${#missing[@]} -gt 0 ]; then
    say "installing ${missing[*]}"
    { update && DEBIAN_FRONTEND=noninteractive "${apt[@]}" install -y --no-install-recommends \
        "${missing[@]}" >>"$work/apt.log" 2>&1; } ||
        die "cannot install ${missing[*]} (see $work/apt.log). RDMA was NOT tested."
fi

# --- kernel: unpacked, never installed ----------------------------------------------------------
kernel=$work/kernel
if [ ! -e "$kernel/complete" ]; then
    rm -rf "$kernel" && mkdir -p "$kernel/deb"
    find_image() { apt-cache depends linux-image-6.12-amd64 2>/dev/null | awk '/Depends: linux-image/ {print $2; exit}'; }
    image=$(find_image)
    [ -n "$image" ] || { update || true; image=$(find_image); }
    [ -n "$image" ] || die "the package archive has no linux-image-6.12-amd64. RDMA was NOT tested."
    say "fetching $image"
    (cd "$kernel/deb" && { "${apt[@]}" download "$image" || { update && "${apt[@]}" download "$image"; }; }) \
        >>"$work/apt.log" 2>&1 || die "cannot fetch $image (see $work/apt.log). RDMA was NOT tested."
    dpkg -x "$kernel"/deb/*.deb "$kernel"
    rm -rf "$kernel/deb"
    depmod -b "$kernel" "$(ls "$kernel/lib/modules")"
    touch "$kernel/complete"
fi
version=$(ls "$kernel/lib/modules")
initrd=$work/initrd-$version.gz
if [ ! -e "$initrd" ] || [ "$here/mkinitrd.sh" -nt "$initrd" ] || [ "$here/init" -nt "$initrd" ]; then
    "$here/mkinitrd.sh" "$kernel" "$here/init" "$initrd" || die "cannot make the initramfs"
fi

# --- the test binary, and the C header's layouts to check ours against --------------------------
share=$work/share
rm -rf "$share" && mkdir -p "$share"
say "building the test binary"
binary=$(cd "$root" && cargo test -q -p firefly-net --lib --no-run --message-format=json |
    sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' | tail -1)
[ -x "$binary" ] || die "cargo made no test binary"
cp "$binary" "$share/net-tests"
gcc -Wall -o "$work/layout" "$here/layout.c" || die "cannot compile layout.c"
"$work/layout" >"$share/layout.txt"
cp "$here/guest.sh" "$share/run.sh"
printf '%s\n' "$filter" >"$share/filter"

# --- boot ---------------------------------------------------------------------------------------
# A kvm device alone proves little: some hosts offer one that cannot run a stock kernel.
if [ -n "${RDMA_VM_ACCEL:-}" ]; then accel=$RDMA_VM_ACCEL
elif grep -Eqw 'vmx|svm' /proc/cpuinfo && [ -w /dev/kvm ]; then accel=kvm
else accel=tcg,thread=multi; fi
cpu=max; [ "$accel" = kvm ] && cpu=host
say "booting $version ($accel)"
start=$(date +%s)
timeout --kill-after=10 "$limit" qemu-system-x86_64 -nodefaults -no-user-config -nographic -serial stdio \
    -monitor none -no-reboot -m 2G -smp 2 -accel "$accel" -cpu "$cpu" \
    -kernel "$kernel/boot/vmlinuz-$version" -initrd "$initrd" \
    -append 'console=ttyS0 panic=-1 quiet loglevel=4' \
    -fsdev local,id=f0,path="$share",security_model=none \
    -device virtio-9p-pci,fsdev=f0,mount_tag=host0 </dev/null >"$work/console.log" 2>&1 ||
    say "qemu ended with $? (limit $limit s)"
say "the machine ran for $(($(date +%s) - start)) s"

[ -e "$share/out.log" ] && cat "$share/out.log"
[ -e "$share/rc" ] || { tail -20 "$work/console.log" >&2; die "the machine reported no result (console: $work/console.log)"; }
rc=$(cat "$share/rc")
[ "$rc" = 0 ] || die "the tests in the machine ended with $rc"
grep -q 'test result: ok. [1-9]' "$share/out.log" || die "no test ran"
say "passed"
