// SPDX-License-Identifier: Apache-2.0

package dataplane

//go:generate go tool bpf2go -cc clang-19 -strip llvm-strip-19 -target bpfel -type addr -type vip_port -type probe -type source_key -type rate_kind -type rates -type bucket -type service_limit -type client_key -type affinity -type service_flag -type mode -type candidate_row -type hint -type budget -type backend_state -type flow_state -type flow_fin -type verb -type verdict -type drop -type event -type trace_step -type packet_flag -type service_key -type backend -type next_hop -type pod_key -type pod -type flow_key -type flow -type lb_node_key -type fragment_key -type fragment -type tunnel_option -type counter -type trace bpf ../../bpf/fairlead.bpf.c -- -O2 -mcpu=v3 -Wall -Wextra -Werror -Wno-unused-parameter -idirafter /usr/include/x86_64-linux-gnu -idirafter /usr/include/aarch64-linux-gnu
//go:generate go tool bpf2go -cc clang-19 -strip llvm-strip-19 -target bpfel -output-suffix _test -no-global-types bench ../../bpf/bench.bpf.c -- -O2 -mcpu=v3 -Wall -Wextra -Werror -Wno-unused-parameter -idirafter /usr/include/x86_64-linux-gnu -idirafter /usr/include/aarch64-linux-gnu
