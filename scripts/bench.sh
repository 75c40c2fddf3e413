#!/usr/bin/env bash
# Platter and qemu-nbd in turn on equal images, with the same client, and the ratios as a Markdown table.
# Further arguments go to `platter bench`, for example: scripts/bench.sh --workload read-4k --rounds 5
set -euo pipefail
cd "$(dirname "$0")/.."

command -v qemu-nbd >/dev/null || { echo "bench: qemu-nbd is missing (Debian: qemu-utils)" >&2; exit 1; }
trace=()
if command -v strace >/dev/null; then
	trace=(--strace)
else
	echo "bench: without strace (Debian: strace) write calls and fdatasyncs are not counted" >&2
fi
exec bin/platter bench --against qemu-nbd "${trace[@]}" "$@"
