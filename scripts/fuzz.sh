#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Runs every fuzz target for some seconds: scripts/fuzz.sh [TIME]. Writes the
# results as `go test -json` does.
set -euo pipefail
cd "$(dirname "$0")/.."
time=${1:-10s}

grep --recursive --files-with-matches --include '*_test.go' '^func Fuzz' . | xargs -r dirname | sort -u |
	while read -r package; do
		grep --no-filename --only-matching '^func Fuzz[A-Za-z0-9_]*' "$package"/*_test.go | cut -d ' ' -f 2 |
			while read -r target; do
				go test -json -run '^$' -fuzz "^$target\$" -fuzztime "$time" "$package" </dev/null || true
			done
	done
