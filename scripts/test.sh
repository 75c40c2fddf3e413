#!/usr/bin/env bash
# Runs every test, with the race detector unless RACE is set to nothing, and reports the coverage of the
# engine: the packages that hold the data of users.
set -euo pipefail
cd "$(dirname "$0")/.."

race=${RACE--race}
if [ -n "$race" ] && ! command -v "$(go env CC)" >/dev/null; then
	echo "test: no C compiler, so no race detector" >&2
	race=
fi

module=$(go list -m)
mapfile -t packages < <(go list ./...)
engine=() others=() crashcases=$module/internal/crashcases
for p in "${packages[@]}"; do
	if [[ $p =~ ^$module/(block|storage|format|image|nbd|jobs|crashlab)(/|$) ]]; then
		engine+=("$p")
	elif [ "$p" != "$crashcases" ]; then
		others+=("$p")
	fi
done

# Under the race detector the counters of coverage, which have to be atomic there, cost several times what the tests
# do. So the tests of the engine run twice: in full and counted without it, and under it without most of what one
# goroutine works on. The crash cases are about the order of writes and most of them have one goroutine: only those with
# several run under it.
CGO_ENABLED=0 go test -timeout 15m -covermode=set -coverprofile=coverage.out "${engine[@]}" "$crashcases" || exit 1
if [ -n "$race" ]; then
	export CGO_ENABLED=1
	go test $race -timeout 15m "${engine[@]}" "${others[@]}" || exit 1
	go test $race -timeout 15m -run 'NoViolations/.*/.*/parallel' "$crashcases" || exit 1
else
	go test -timeout 15m "${others[@]}" || exit 1
fi

echo
echo "coverage of the engine:"
scripts/coverage.sh coverage.out
