#!/usr/bin/env bash
# The harness's own test: scenarios that fail in every way that the harness must notice, each of
# which would pass if the check behind it were missing.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
log=$(mktemp)
trap 'rm -f "$log"' EXIT

code=0
RDMA_VM_SCENARIOS=$here/selftest "$here/run.sh" >"$log" 2>&1 || code=$?
if [ "$code" = 77 ]; then cat "$log"; exit 77; fi
bad() { cat "$log"; printf '\nrdma-vm selftest: FAILED: %s\n' "$*" >&2; exit 1; }
# expect NAME VERDICT REASON: the closing table's line of a scenario.
expect() { grep -Eq "^  $1 +$2 .*$3" "$log" || bad "no line \"$1 ... $2 ... $3\""; }
[ "$code" = 1 ] || bad "exit code $code, not 1"
expect passes ok ''
expect fails FAILED 'exit code 101'
expect hangs FAILED 'longer than its limit of 3 s'
expect empty FAILED 'no test ran'
expect left-over ok ''
expect vanishes FAILED 'reported no result'
expect half FAILED 'exit code 3 machine 2 reported no result'
expect two ok '2 tests'
grep -q 'test it_fails ... FAILED' "$log" || bad "the failed test's name is not shown"
# A kernel that finds nothing to run: tried again, and no success.
code=0
RDMA_VM_APPEND=rdinit=/nothing RDMA_VM_SCENARIOS=$here/selftest "$here/run.sh" passes >"$log" 2>&1 || code=$?
[ "$code" = 1 ] || bad "exit code $code, not 1, where no machine boots"
[ "$(grep -c 'machine 1 did not boot' "$log")" = 3 ] || bad "three boots were not tried"
expect passes FAILED 'reported no result'
printf 'rdma-vm: the harness notices failures, hangs, silence and dead machines\n'
