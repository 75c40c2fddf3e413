#!/usr/bin/env bash
# Prints the share of statements that tests ran, for each package of the engine, from a coverage profile.
set -euo pipefail

awk -v OFS='\t' '
	FNR == 1 { next } # mode: …
	{
		# github.com/platter-disk/platter/storage/memory.go:12.3,14.5 STATEMENTS COUNT
		file = $1; sub(/:.*/, "", file); sub(/\/[^\/]*$/, "", file); sub(/^github.com\/platter-disk\/platter\/?/, "", file)
		if (file !~ /^(block|storage|format|image|nbd|jobs|crashlab)(\/|$)/ || file ~ /test$/) next # helpers of tests
		all[file] += $2; if ($3 > 0) hit[file] += $2
	}
	END { for (p in all) printf "%6.1f %%  %s\n", 100 * hit[p] / all[p], p }
' "$1" | sort -k3
