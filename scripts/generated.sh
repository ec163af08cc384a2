#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Checks that generating again, in another directory, gives the committed
# files byte for byte.
set -euo pipefail
cd "$(dirname "$0")/.."

copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
git -c safe.directory='*' ls-files --cached --others --exclude-standard -z |
	tar --create --null --files-from - --ignore-failed-read 2>/dev/null | tar --extract --directory "$copy"

mapfile -t generated < <(cd "$copy" && find . -name '*_bpfel*.go' -o -name '*_bpfel*.o')
if ((${#generated[@]} == 0)); then
	echo "generated: no compiled BPF program in this tree" >&2
	exit 1
fi
(cd "$copy" && rm -- "${generated[@]}" && go generate ./...)
for file in "${generated[@]}"; do
	cmp "$file" "$copy/$file"
done
echo "generated: ${#generated[@]} files as committed"
