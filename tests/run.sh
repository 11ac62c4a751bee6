#!/usr/bin/env bash
# `make test`: every check that must pass, in the order of what fails fastest, with the time that
# each part took at the end. Installs what it needs.
set -euo pipefail
cd "$(dirname "$0")/.."

parts=()
part() { # NAME COMMAND...
    local name=$1 start=$SECONDS
    shift
    printf '\n\033[1m==== %s\033[0m\n' "$name"
    if ! "$@"; then
        printf '\n==== %s FAILED\n' "$name" >&2
        exit 1
    fi
    parts+=("$(printf '%-34s %4d s' "$name" $((SECONDS - start)))")
}

torch_log=$(mktemp)
trap 'rm -f "$torch_log"' EXIT

python_package() {
    FIREFLY_LIB_DIR="$PWD/target/debug" .venv/bin/python -m pip install --quiet --disable-pip-version-check \
        --no-build-isolation --no-deps ./python
}

# Where its packages or kernel cannot be had, RDMA is not tested, and the closing lines say so.
not_tested=()
rdma() {
    local code=0
    tests/rdma-vm/run.sh --fast || code=$?
    [ "$code" = 77 ] || return "$code"
    [ "${FIREFLY_REQUIRE_RDMA:-}" != 1 ] || return 1
    not_tested+=("RDMA WAS NOT TESTED: $(cat "${CARGO_TARGET_DIR:-target}/rdma-vm/why-not")")
}

part "system packages" deploy/setup.sh build run test
# torch is 3 GB to fetch: that goes on while the compiler works.
deploy/setup.sh torch >"$torch_log" 2>&1 &
torch_pid=$!
part "format" cargo fmt --all --check
part "lint" cargo clippy --workspace --all-targets --quiet -- -D warnings
part "build" cargo build --workspace
part "unit, integration, simulation" cargo test --workspace --exclude firefly-tests
part "torch (fetch, once)" bash -c "tail --pid=$torch_pid -f /dev/null; cat $torch_log"
wait "$torch_pid"
part "digits (fetch, once)" deploy/digits/fetch.sh .cache
part "python package" python_package
part "python tests" .venv/bin/python -m pytest -q python/tests
part "RDMA in a virtual machine" rdma
part "end to end" env FIREFLY_REQUIRE_TORCH=1 cargo test -p firefly-tests -- --test-threads=1

printf '\n==== all parts passed\n'
printf '%s\n' "${parts[@]}" "$(printf '%-34s %4d s' "in all" $SECONDS)"
for line in "${not_tested[@]}"; do printf '\n\033[1;31m!!!! %s\033[0m\n' "$line"; done
