#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Compiles every BPF program with warnings as errors.
set -euo pipefail
cd "$(dirname "$0")/.."

for source in bpf/*.bpf.c; do
	clang-19 -target bpf -mcpu=v3 -O2 -g -Wall -Wextra -Werror \
		-I "/usr/include/$(gcc -dumpmachine)" -c "$source" -o /dev/null
done
