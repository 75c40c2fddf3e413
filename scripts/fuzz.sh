#!/usr/bin/env bash
# Runs every fuzz target for FUZZTIME (a duration, or a number of inputs such as 10000x). With -race or
# without makes no difference here: fuzzing looks for panics, hangs and broken promises of the decoders.
set -euo pipefail
cd "$(dirname "$0")/.."

fuzztime=${FUZZTIME:-3s}

# `go test -list` prints the targets of a package, then "ok  package  time".
go test -list '^Fuzz' ./... | awk '
	/^Fuzz/ { targets[++n] = $1 }
	/^ok/ { for (i = 1; i <= n; i++) print $2, targets[i]; n = 0 }
' >"${TMPDIR:-/tmp}/platter-fuzz-targets.$$"
trap 'rm -f "${TMPDIR:-/tmp}/platter-fuzz-targets.$$"' EXIT

while read -r package target; do
	echo "fuzz $package $target"
	log=$(go test -run '^$' -fuzz "^$target\$" -fuzztime "$fuzztime" "$package" 2>&1) && continue
	# The fuzzer may end its time in the middle of an input and call that a failure. A find names its input.
	if grep -q 'context deadline exceeded' <<<"$log" && ! grep -Eq 'Failing input|panic|_test\.go:' <<<"$log"; then
		echo "  (the fuzzer was interrupted by the end of its time)"
		continue
	fi
	echo "$log"
	exit 1
done <"${TMPDIR:-/tmp}/platter-fuzz-targets.$$"
