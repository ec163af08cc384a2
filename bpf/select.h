/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Which service a packet is for, and which backend takes it: hash first. No
 * table of flows is read.
 */
#pragma once

#include "count.h"
#include "hash.h"
#include "parse.h"

/* What was chosen, and by what. */
struct choice {
	struct backend *backend;
	__u64 word;    /* the backend's, read once */
	__u64 hash;    /* of the flow */
	__u32 service; /* number */
	__u32 number;  /* of the backend */
	__u8 verb;     /* enum verb */
	__u8 attempt;
};

static __always_inline void trace_packet(const struct packet *packet)
{
	TRACING(to->src = packet->src; to->dst = packet->dst; to->src_port = packet->src_port;
		to->dst_port = packet->dst_port; to->proto = packet->proto;
		to->family = packet->family; to->flags = packet->flags; to->steps |= TRACE_PARSED);
}

/* Whether the address may be a VIP. False positives cost a look-up. */
static __always_inline bool maybe_vip(const struct addr *a)
{
	const __u64 *halves = (const void *)a;
	__u64 bit =
		((halves[0] * VIP_BITS_MIX0 + halves[1]) * VIP_BITS_MIX1) >> (64 - VIP_BITS_LOG2);
	__u32 at = bit >> 6;
	__u64 *word = bpf_map_lookup_elem(&vip_bits, &at);

	return word && (READ_ONCE(*word) >> (bit & 63)) & 1;
}

/* Whether the address is a VIP for certain: the key without port and protocol. */
__noinline bool is_vip(const struct addr *a)
{
	struct service_key key = {};

	if (!a)
		return false;
	key.vip = *a;
	return bpf_map_lookup_elem(&services, &key) != NULL;
}

static __always_inline __u32 *find_service(const struct addr *vip, __be16 port, __u8 proto)
{
	struct service_key key __attribute__((aligned(8)));
	const __u64 *from = (const void *)vip;
	__u64 *to = (void *)&key;

	to[0] = from[0];
	to[1] = from[1];
	*(__u32 *)&key.port = port | (__u32)proto << 16;
	return bpf_map_lookup_elem(&services, &key);
}

static __always_inline __u8 backend_state(__u64 word)
{
	return word >> BACKEND_STATE_SHIFT;
}

static __always_inline __u32 generation_of(__u64 word)
{
	return (word >> BACKEND_GENERATION_SHIFT) & BACKEND_GENERATION_MASK;
}

static __always_inline bool usable(__u64 word)
{
	__u8 state = backend_state(word);

	return state == BACKEND_ACTIVE || state == BACKEND_DRAINING;
}

/* The word of a slot; 0 when there is none. */
static __always_inline __u64 slot_word(__u32 offset, __u32 slot)
{
	__u32 at = offset + slot;
	__u64 *cell = bpf_map_lookup_elem(&slots, &at);

	return cell ? READ_ONCE(*cell) : 0;
}

/* The slot's backend is gone: the first usable one of the following slots
 * stands in, the same on every LB node. Returns its number, or 0. */
__noinline __u32 stand_in(__u64 service_word, __u32 slot)
{
	__u32 bits = (service_word >> SERVICE_BITS_SHIFT) & 31;
	__u32 number = 0;

	for (int i = 0; i < STAND_INS_MAX; i++) {
		struct backend *backend;

		slot = (slot + 1) & ((1U << bits) - 1);
		number = (__u32)slot_word((__u32)service_word, slot);
		backend = bpf_map_lookup_elem(&backends, &number);
		if (backend && number && usable(READ_ONCE(backend->word))) {
			TRACING(to->slot = slot; to->steps |= TRACE_STAND_IN);
			count_event(EVENT_STAND_IN);
			return number;
		}
	}
	return 0;
}

/* The word of a service; 0 when there is none. */
static __always_inline __u64 read_service(__u32 service)
{
	__u64 *cell = bpf_map_lookup_elem(&service_words, &service);

	return cell ? READ_ONCE(*cell) : 0;
}

static __always_inline __u32 service_flags(__u64 service_word)
{
	return service_word >> SERVICE_FLAGS_SHIFT;
}

/* The hash of a flow, whatever its service. */
__noinline __u64 whole_hash(const struct packet *packet)
{
	if (!packet)
		return 0;
	return flow_hash(&packet->src, &packet->dst, packet->src_port, packet->dst_port,
			 packet->proto, packet->family);
}

/* The hash that chooses the slot: with affinity, all flows of a client to a
 * port of the service have the same. */
static __always_inline __u64 slot_hash(const struct packet *packet, __u64 service_word)
{
	__be16 port = service_flags(service_word) & SERVICE_AFFINITY ? 0 : packet->src_port;

	return flow_hash(&packet->src, &packet->dst, port, packet->dst_port, packet->proto,
			 packet->family);
}

/* Where a flow of a service is: its slot's word, and the slot. Returns 0 or an
 * enum drop. */
static __always_inline int find_slot(__u32 service, __u64 hash, __u64 service_word, __u32 *slot,
				     __u64 *word)
{
	__u32 bits = (service_word >> SERVICE_BITS_SHIFT) & 31;

	TRACING(to->service = service; to->hash = hash; to->steps |= TRACE_SERVICE);
	if (unlikely(!bits))
		return DROP_NO_BACKEND;
	*slot = hash >> (64 - bits);
	*word = slot_word((__u32)service_word, *slot);
	TRACING(to->slot = *slot; to->slot_word = *word; to->steps |= TRACE_SLOT);
	return DROP_NONE;
}

/* A question, unless it begins a flow, or is a datagram: asking costs nothing
 * in a settled slot, as the answer is nearly always yes. */
static __always_inline __u8 settled_verb(const struct packet *packet)
{
	if (packet->flags & PACKET_ICMP_ERROR)
		return VERB_ASK;
	return packet->proto == IPPROTO_TCP && !(packet->flags & PACKET_SYN) ? VERB_ASK
									     : VERB_DELIVER;
}

/* Chooses the backend of a flow in a settled slot: by the hash alone. Returns 0
 * or an enum drop. */
static __always_inline int choose(const struct packet *packet, __u64 service_word, __u32 slot,
				  __u64 word, struct choice *choice)
{
	choice->number = (__u32)word;
	choice->backend = bpf_map_lookup_elem(&backends, &choice->number);
	if (unlikely(!choice->backend))
		return DROP_NO_BACKEND;
	choice->word = READ_ONCE(choice->backend->word);
	if (unlikely(!usable(choice->word))) {
		choice->number = stand_in(service_word, slot);
		choice->backend = bpf_map_lookup_elem(&backends, &choice->number);
		if (!choice->number || !choice->backend)
			return DROP_NO_BACKEND;
		choice->word = READ_ONCE(choice->backend->word);
	}
	choice->verb = settled_verb(packet);
	choice->attempt = choice->verb == VERB_ASK ? ATTEMPT_SLOT : ATTEMPT_ORDER;
	TRACING(to->backend = choice->number; to->verb = choice->verb;
		to->attempt = choice->attempt; to->steps |= TRACE_BACKEND);
	return DROP_NONE;
}
