#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Installs the Debian packages that the tests need and that are missing. Says
# nothing when none is.
set -euo pipefail

packages=(
	clang-19 llvm-19 libbpf-dev linux-libc-dev # to compile the BPF programs
	clang-format-19 shellcheck                 # to check C and shell
	tshark                                     # the independent decoder of packets
	nftables iproute2                          # what a node beside Fairlead has
	qemu-system-x86                            # to boot other kernels
	gcc libc6-dev                              # for Go's race detector
	git
)

if ! command -v apt-get >/dev/null; then
	echo "install: no apt-get here; this machine must have: ${packages[*]}" >&2
	exit 0
fi

missing=()
for package in "${packages[@]}"; do
	status=$(dpkg-query --show --showformat '${db:Status-Status}' "$package" 2>/dev/null || true)
	[[ $status == installed ]] || missing+=("$package")
done

# Kernels for test/kernels are looked up in the lists, though not installed.
if ((${#missing[@]})) || ! apt-cache show linux-image-6.12-cloud-amd64 &>/dev/null; then
	apt-get update -qq
fi
if ((${#missing[@]})); then
	echo "install: ${missing[*]}"
	DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${missing[@]}" >/dev/null
fi
