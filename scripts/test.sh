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
[ -z "$race" ] || export CGO_ENABLED=1

# The crash cases are about the order of writes, not of goroutines, and most of them have one: the race detector
# would only make them ten times slower. Those with several run under it.
crashcases=./internal/crashcases
mapfile -t packages < <(go list ./... | grep -v "/${crashcases##*/}\$")
go test $race -timeout 20m -covermode=atomic -coverprofile=coverage.out "${packages[@]}" || exit 1
go test -timeout 20m "$crashcases" || exit 1
[ -z "$race" ] || go test $race -timeout 20m -run 'NoViolations/.*/.*/parallel' "$crashcases" || exit 1

echo
echo "coverage of the engine:"
scripts/coverage.sh coverage.out
