/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * What goes to and fro between LB nodes and backends' nodes: packets that are
 * asked about in turn, and tunnel packets that go back with the answer no.
 */
#pragma once

#include "ask.h"
#include "deliver.h"
#include "encap.h"

/* A packet that `ask` has found a backend for. Returns an XDP action, or minus
 * the number of a backend on this node: delivering needs stack, so it is for
 * the caller's caller, see deliver_to. */
static __always_inline int send(struct xdp_md *ctx, struct packet *packet, struct ask *ask,
				__u64 hash)
{
	struct choice choice = {.hash = hash, .service = ask->service, .number = ask->number};

	choice.backend = bpf_map_lookup_elem(&backends, &choice.number);
	if (!choice.backend)
		return xdp_drop(DROP_NO_BACKEND);
	choice.word = READ_ONCE(choice.backend->word);
	choice.verb = ask->verb;
	choice.attempt = ask->attempt;
	TRACING(to->backend = ask->number; to->verb = ask->verb; to->attempt = ask->attempt;
		to->steps |= TRACE_BACKEND);
	if (config.backend && choice.backend->mode == MODE_LOCAL) {
		count_choice(packet, &choice);
		return -(int)choice.number;
	}
	return forward(ctx, packet, &choice);
}

/* Delivers to a backend on this node, which was found to own the flow or is to
 * take it; any other action goes through. */
static __always_inline int deliver_to(struct xdp_md *ctx, struct packet *packet, int action,
				      __u64 hash)
{
	__u32 number = -action;
	struct backend *backend;
	struct pod_key pod;
	int drop;

	if (!config.backend || action >= 0)
		return action;
	backend = bpf_map_lookup_elem(&backends, &number);
	if (!backend)
		return xdp_drop(DROP_NO_BACKEND);
	pod.address = backend->address;
	pod.port = backend->port;
	pod.proto = packet->proto;
	pod.pad = 0;
	drop = claim(ctx, packet, &pod, hash, VERB_DELIVER);
	if (drop == CLAIM_COOKIE)
		return send_cookie(ctx, packet, &pod);
	if (drop)
		return xdp_drop(drop < 0 ? DROP_TUNNEL_POD : drop);
	return deliver(ctx, packet, &pod);
}

static __always_inline int locate(struct ask *ask, const struct packet *packet, __u32 service,
				  __u64 hash)
{
	ask->service = service;
	ask->service_word = read_service(service);
	ask->flow = service_flags(ask->service_word) & SERVICE_AFFINITY ? whole_hash(packet) : hash;
	return find_slot(service, hash, ask->service_word, &ask->slot, &ask->slot_word);
}

/* A packet of a contested slot. Returns what send does. */
__noinline int contest(struct xdp_md *ctx, struct packet *packet, __u32 service, __u64 hash,
		       __u32 owned)
{
	struct ask ask = {.owned = owned};
	int drop;

	if (!packet)
		return XDP_DROP;
	drop = locate(&ask, packet, service, hash);
	if (!drop)
		drop = ask_first(packet, &ask, hash);
	return drop ? xdp_drop(drop) : send(ctx, packet, &ask, hash);
}

/* A packet that was denied: by its backend's node, or by a look-up here. Its
 * attempt and number are those of the denial. Returns what send does. */
__noinline int denied(struct xdp_md *ctx, struct packet *packet, __u32 service, __u64 hash,
		      __u64 denial)
{
	__u32 attempt = (denial >> 32) & 0xff, denier = denial;
	struct ask ask = {.attempt = attempt, .owned = denial >> 40};
	int drop;

	if (!packet)
		return XDP_DROP;
	drop = locate(&ask, packet, service, hash);
	if (!drop)
		drop = ask_again(packet, &ask, denier);
	return drop ? xdp_drop(drop) : send(ctx, packet, &ask, hash);
}

/* All in one argument: a function has five at most. */
static __always_inline __u64 denial(__u8 attempt, __u32 denier, bool owned)
{
	return (__u64)owned << 40 | (__u64)attempt << 32 | denier;
}

/* Sends a tunnel packet back to where it came from, as it came but for the
 * verb. Returns an XDP action. */
__noinline int deny(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *data_end = (void *)(long)ctx->data_end;
	struct geneve_outer *at;
	struct packet outer;
	__be16 type;
	__u32 l3;

	if (parse_link(data, data_end, &l3, &type) ||
	    parse_addresses(data, data_end, l3, type, &outer))
		return xdp_drop(DROP_MALFORMED);
	at = data + (outer.l4 & OFFSET_MASK);
	if ((void *)(at + 1) > data_end)
		return xdp_drop(DROP_MALFORMED);
	at->geneve.option.verb = VERB_DENIED;
	at->udp.check = 0;
	if (outer.family == 4) {
		struct iphdr *ip = data + (outer.l3 & OFFSET_MASK);
		__u16 *ttl;

		if ((void *)(ip + 1) > data_end)
			return xdp_drop(DROP_MALFORMED);
		ip->saddr = outer.dst.w[3];
		ip->daddr = outer.src.w[3];
		ttl = (__u16 *)&ip->ttl;
		ip->check = move_sum(ip->check, *ttl, bpf_htons(OUTER_TTL << 8 | IPPROTO_UDP));
		ip->ttl = OUTER_TTL;
	} else {
		struct ipv6hdr *ip = data + (outer.l3 & OFFSET_MASK);

		if ((void *)(ip + 1) > data_end)
			return xdp_drop(DROP_MALFORMED);
		__builtin_memcpy(&ip->saddr, &outer.dst, sizeof(ip->saddr));
		__builtin_memcpy(&ip->daddr, &outer.src, sizeof(ip->daddr));
		ip->hop_limit = OUTER_TTL;
	}
	swap_macs(data);
	count_event(EVENT_DENIED);
	TRACE(verdict, VERDICT_DENY);
	return XDP_TX;
}

/* Whether the backend that a bounce names is on the node that sent it, and is
 * one that the flow could have been sent to. */
static __always_inline bool may_deny(const struct ask *ask, __u32 denier)
{
	if (denier == (__u32)ask->slot_word || hinted(&hints, ask->flow) == denier)
		return true;
	for (__u32 i = ATTEMPT_CANDIDATE; i < ATTEMPTS_MAX; i++)
		if (attempted(ask, i) == denier)
			return true;
	for (__u32 i = 1; i <= STAND_INS_MAX; i++) {
		__u32 bits = (ask->service_word >> SERVICE_BITS_SHIFT) & 31;

		if ((__u32)slot_word((__u32)ask->service_word,
				     (ask->slot + i) & ((1U << bits) - 1)) == denier)
			return true;
	}
	return false;
}

/* The row of the backend that a bounce says it comes from, if it does. */
__noinline int from_backend(const struct packet *outer, __u32 number, __u32 generation, __u64 tag)
{
	struct backend *row = bpf_map_lookup_elem(&backends, &number);

	return outer && row && number && row->mode == MODE_GENEVE &&
	       same_addr(&row->tunnel, &outer->src) && row->tag == tag &&
	       generation_of(READ_ONCE(row->word)) == generation;
}

/* The service of a bounce's flow, if its hash proves that this shard sent it
 * and the denier can have been asked; else 0. */
__noinline __u32 bounced_service(const struct packet *inner, __u64 hash, __u32 denier)
{
	struct ask ask = {};
	__u32 *service;

	if (!inner)
		return 0;
	service = find_service(&inner->dst, inner->dst_port, inner->proto);
	if (!service || slot_hash(inner, read_service(*service)) != hash)
		return 0;
	if (locate(&ask, inner, *service, hash) || !may_deny(&ask, denier))
		return 0;
	return *service;
}
