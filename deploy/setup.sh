#!/usr/bin/env bash
# Installs what is missing to build, test and run Firefly on Debian 12: system packages, and a
# Python environment in the project folder. Says what it does; does nothing that is done already.
#
#   deploy/setup.sh build    compiler, protoc                                  (seconds)
#   deploy/setup.sh run      what a mount needs                                (seconds)
#   deploy/setup.sh torch    .venv with the current torch        (3 GB to fetch, 2-5 minutes, once)
#   deploy/setup.sh test     tools that tests use (git, python3, ...)          (seconds)
#   deploy/setup.sh bench    fio, iperf3                                       (seconds)
#   deploy/setup.sh rdma     what the virtual machines of tests/rdma-vm need   (half a minute)
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf '\033[1m== %s\033[0m\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

# need COMMAND-OR-FILE PACKAGE ...: collects the packages whose command or file is not there.
missing=()
need() {
    case $1 in
        /*) [ -e "$1" ] || missing+=("$2") ;;
        *) command -v "$1" >/dev/null 2>&1 || missing+=("$2") ;;
    esac
}

install_missing() {
    [ ${#missing[@]} -gt 0 ] || return 0
    command -v apt-get >/dev/null 2>&1 || die "please install: ${missing[*]}"
    [ "$(id -u)" = 0 ] || die "please install as root: apt-get install ${missing[*]}"
    say "installing system packages: ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -y -qq -o DPkg::Lock::Timeout=300 --no-install-recommends "${missing[@]}" >/dev/null
    missing=()
}

python_for_venv() {
    for candidate in python3 python3.11; do
        if command -v "$candidate" >/dev/null 2>&1 && "$candidate" -c 'import venv, ensurepip' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
}

for part in "$@"; do
    case $part in
        build)
            need cc gcc
            need protoc protobuf-compiler
            need /usr/include/google/protobuf/any.proto libprotobuf-dev
            install_missing
            command -v cargo >/dev/null 2>&1 || die "there is no cargo: install Rust (https://rustup.rs), then run this again"
            ;;
        run)
            need fusermount3 fuse3
            install_missing
            ;;
        test)
            need git git
            need python3 python3
            need tar tar
            install_missing
            ;;
        bench)
            need fio fio
            need iperf3 iperf3
            install_missing
            ;;
        rdma)
            need qemu-system-x86_64 qemu-system-x86
            # The commands of these exist in other packages too.
            need /usr/share/doc/busybox-static busybox-static
            need /etc/libibverbs.d/rxe.driver ibverbs-providers
            need /usr/include/infiniband/verbs.h libibverbs-dev
            need /usr/include/stdio.h libc6-dev
            need ibv_devices ibverbs-utils
            need cc gcc
            need cpio cpio
            need depmod kmod
            need rdma iproute2
            need xz xz-utils
            install_missing
            ;;
        torch)
            need g++ g++
            if [ -z "$(python_for_venv)" ]; then missing+=(python3-venv python3-dev); fi
            install_missing
            python=$(python_for_venv)
            [ -n "$python" ] || die "no Python with venv was found"
            "$python" -c 'import os, sysconfig; raise SystemExit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' \
                || { missing+=(python3-dev); install_missing; }
            if [ ! -x .venv/bin/python ]; then
                say "making a Python environment in .venv"
                "$python" -m venv .venv
            fi
            if ! .venv/bin/python -c 'import torch, numpy, sklearn, pytest, ninja, expecttest, setuptools, wheel' 2>/dev/null; then
                free=$(df --output=avail -BG . | tail -n 1 | tr -dc 0-9)
                [ "$free" -ge 10 ] || die "torch needs about 9 GB of disk while it installs and ${free} GB are free here"
                say "fetching torch and friends into .venv: about 3 GB, 2 to 5 minutes, once"
                .venv/bin/python -m pip install --quiet --disable-pip-version-check \
                    torch numpy scikit-learn pytest ninja expecttest setuptools wheel
            fi
            ;;
        *) die "unknown part: $part" ;;
    esac
done
