/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Counters and traces. With config.tracing set nothing is counted, and what
 * was decided stands in traces[0]; without it the verifier drops the writes.
 */
#pragma once

#include "maps.h"
#include <stdbool.h>

/* TRACING(statements): those that write to the trace `to`, when tracing. One
 * check for several fields: each costs a load even where nothing is traced. */
#define TRACING(...)                                                                               \
	do {                                                                                       \
		if (config.tracing) {                                                              \
			__u32 trace_at = 0;                                                        \
			struct trace *to = bpf_map_lookup_elem(&traces, &trace_at);                \
			if (to) {                                                                  \
				__VA_ARGS__;                                                       \
			}                                                                          \
		}                                                                                  \
	} while (0)

#define TRACE(field, value) TRACING(to->field = (value))
#define TRACE_STEP(step) TRACING(to->steps |= (step))

static __always_inline void count_event(__u32 event)
{
	__u64 *counter;

	if (config.tracing)
		return;
	counter = bpf_map_lookup_elem(&events, &event);
	if (counter)
		(*counter)++;
}

/* Counts why a packet is dropped. The caller drops it. */
static __always_inline void count_drop(__u32 reason)
{
	__u64 *counter;

	TRACE(verdict, VERDICT_DROP);
	TRACE(drop, reason);
	if (config.tracing)
		return;
	counter = bpf_map_lookup_elem(&drops, &reason);
	if (counter)
		(*counter)++;
}

static __always_inline int xdp_drop(__u32 reason)
{
	count_drop(reason);
	return XDP_DROP;
}

static __always_inline int xdp_pass(void)
{
	TRACE(verdict, VERDICT_PASS);
	return XDP_PASS;
}

static __always_inline void count_packet(void *map, __u32 number, __u32 bytes, bool syn)
{
	struct counter *counter;

	if (config.tracing)
		return;
	counter = bpf_map_lookup_elem(map, &number);
	if (!counter)
		return;
	counter->packets++;
	counter->bytes += bytes;
	counter->connections += syn;
}
