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

go test $race -timeout 20m -covermode=atomic -coverprofile=coverage.out ./... || exit 1

echo
echo "coverage of the engine:"
scripts/coverage.sh coverage.out
