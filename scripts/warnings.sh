#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Compiles every BPF program with warnings as errors.
set -euo pipefail
cd "$(dirname "$0")/.."

for source in bpf/*.bpf.c; do
	# A program's entry has the parameters that the kernel says, used or not.
	clang-19 -target bpf -mcpu=v3 -O2 -g -Wall -Wextra -Werror -Wno-unused-parameter \
		-idirafter "/usr/include/$(gcc -dumpmachine)" -c "$source" -o /dev/null
done
