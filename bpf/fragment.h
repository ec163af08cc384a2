/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Fragments: the first carries the ports, and leaves a record of them for the
 * rest. Records are bounded (LRU) and short-lived.
 */
#pragma once

#include "maps.h"
#include "parse.h"

static __always_inline struct fragment_key fragment_of(const struct packet *packet)
{
	return (struct fragment_key){
		.src = packet->src, .dst = packet->dst, .id = packet->id, .proto = packet->proto};
}

/* Of a first fragment. */
__noinline int remember_fragment(const struct packet *packet)
{
	struct fragment_key key;
	struct fragment fragment = {.seen = bpf_ktime_get_coarse_ns()};

	if (!packet || config.tracing)
		return 0;
	key = fragment_of(packet);
	fragment.src_port = packet->src_port;
	fragment.dst_port = packet->dst_port;
	return bpf_map_update_elem(&fragments, &key, &fragment, BPF_ANY);
}

/* Of a later one: fills in the ports, or returns DROP_FRAGMENT_UNKNOWN. */
__noinline int recall_fragment(struct packet *packet)
{
	struct fragment_key key;
	struct fragment *fragment;

	if (!packet)
		return DROP_FRAGMENT_UNKNOWN;
	key = fragment_of(packet);
	fragment = bpf_map_lookup_elem(&fragments, &key);
	if (!fragment || bpf_ktime_get_coarse_ns() - fragment->seen > FRAGMENT_NS)
		return DROP_FRAGMENT_UNKNOWN;
	packet->src_port = fragment->src_port;
	packet->dst_port = fragment->dst_port;
	return 0;
}
