// SPDX-License-Identifier: Apache-2.0

package testnet

//go:generate go tool bpf2go -cc clang-19 -strip llvm-strip-19 -target bpfel -type sight -type direction -type sight_key -type vip_key bpf ../../bpf/testnet.bpf.c -- -O2 -mcpu=v3 -Wall -Wextra -Werror -idirafter /usr/include/x86_64-linux-gnu -idirafter /usr/include/aarch64-linux-gnu
