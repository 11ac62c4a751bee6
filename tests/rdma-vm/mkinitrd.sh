#!/usr/bin/env bash
# mkinitrd.sh KERNEL_TREE INIT OUT.gz: busybox, the RDMA user space and the modules in load order.
set -euo pipefail
kernel=$1 init=$2 out=$3
version=$(ls "$kernel/lib/modules")
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
mkdir -p "$tree"/{bin,usr/bin,proc,sys,dev,tmp,run,share,mod,lib64,etc}
# Debian merges /lib into /usr/lib; so does this tree.
lib=usr/lib/x86_64-linux-gnu
mkdir -p "$tree/$lib/libibverbs"
ln -s usr/lib "$tree/lib"

cp "$(command -v busybox)" "$tree/bin/busybox"
for applet in $("$tree/bin/busybox" --list); do
    [ "$applet" = busybox ] || ln -s busybox "$tree/bin/$applet"
done

libs_of() { ldd "$1" 2>/dev/null | grep -o '/[^ ]*' || true; }
add_libs() {
    local path
    for path in $(libs_of "$1"); do
        case $path in
            */ld-linux*) cp -L "$path" "$tree/lib64/" ;;
            *) cp -Ln "$path" "$tree/$lib/" ;;
        esac
    done
}
for tool in ibv_devices ibv_devinfo rdma ip tc; do
    path=$(command -v "$tool") || continue
    cp -L "$path" "$tree/usr/bin/$tool"
    add_libs "$path"
done
# Opened at run time, so ldd does not know them: the test binary looks up libibverbs, that opens the
# provider, and pthread_exit opens libgcc_s.
for path in /$lib/libibverbs.so.1 /$lib/libgcc_s.so.1 /lib/x86_64-linux-gnu/libgcc_s.so.1 \
            /$lib/libm.so.6 /lib/x86_64-linux-gnu/libm.so.6; do
    [ -e "$path" ] && cp -Ln "$path" "$tree/$lib/" && add_libs "$path"
done
provider=$(ls /$lib/libibverbs/librxe-rdmav*.so)
cp "$provider" "$tree/$lib/libibverbs/" && add_libs "$provider"
mkdir -p "$tree/etc/libibverbs.d" && cp /etc/libibverbs.d/rxe.driver "$tree/etc/libibverbs.d/"

# crc32_generic first: rxe asks the crypto interface for "crc32" and nobody in here would load it.
n=0
: >"$tree/mod/order"
for module in crc32_generic crc32c_generic virtio_pci virtio_net 9p 9pnet_virtio fuse veth dummy sch_netem rdma_rxe ib_uverbs; do
    modprobe -d "$kernel" -S "$version" --show-depends "$module" 2>/dev/null | while read -r verb path _; do
        # A module that is built in prints "builtin NAME".
        if [ "$verb" = insmod ]; then echo "$path"; fi
    done
done | awk '!seen[$0]++' | while read -r path; do
    n=$((n + 1))
    name=$(printf '%02d-%s' "$n" "$(basename "${path%.xz}")")
    case $path in *.xz) xz -dc "$path" >"$tree/mod/$name" ;; *) cp "$path" "$tree/mod/$name" ;; esac
    echo "$name" >>"$tree/mod/order"
done
install -m 755 "$init" "$tree/init"
(cd "$tree" && find . | cpio -o -H newc --quiet | gzip -1) >"$out.part"
mv "$out.part" "$out"
