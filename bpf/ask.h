/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Where the hash may be wrong, the owner is asked: which backend is next, and
 * what becomes of a flow that nobody has. Nothing here runs for a packet of a
 * settled slot, unless it was denied.
 */
#pragma once

#include "deliver.h"
#include "select.h"

/* A question or an order, as far as it has come. */
struct ask {
	__u64 flow; /* its own hash: the key of what is remembered about it */
	__u64 service_word;
	__u64 slot_word;
	__u32 service;
	__u32 slot;   /* within the service */
	__u32 number; /* of the backend that is asked */
	__u8 verb;    /* enum verb */
	__u8 attempt;
	__u8 owned; /* by a Pod of this node, which is asked by a look-up */
	__u8 pad;
};

static __always_inline bool contested(__u64 slot_word)
{
	return slot_word >> SLOT_CANDIDATES_SHIFT;
}

/* Whether a backend in this state can still own a flow of the protocol. */
static __always_inline bool may_own(__u64 word, __u8 proto)
{
	return usable(word) || (proto == IPPROTO_TCP && backend_state(word) == BACKEND_FAILING);
}

/* Whether a Pod of this node owns the flow: no tunnel leads to it. */
__noinline int owned_here(struct xdp_md *ctx, const struct packet *packet)
{
	struct segment segment = {};
	struct flow_key key;
	struct flow *flow;

	if (!packet)
		return 0;
	key = flow_key_of(packet);
	flow = flow_find(&key, bpf_ktime_get_coarse_ns());
	if ((!flow || flow_closed(flow)) && packet->flags & PACKET_SYN) {
		struct pod_key owner = {.proto = packet->proto};

		return affinity_find(&key, &owner);
	}
	if (!flow)
		return 0;
	if (packet->proto != IPPROTO_TCP ||
	    packet->flags & (PACKET_ICMP_ERROR | PACKET_LATER_FRAGMENT))
		return !flow_closed(flow);
	return client_segment(ctx, packet, &segment) && flow_claims(flow, &segment);
}

/* Writes down, in hints or syns, who was asked or told to take a flow. */
static __always_inline void write_hint(void *map, __u64 hash, __u32 number)
{
	struct backend *backend = bpf_map_lookup_elem(&backends, &number);
	struct hint hint = {.backend = number};

	if (config.tracing || !backend)
		return;
	hint.generation = generation_of(READ_ONCE(backend->word));
	bpf_map_update_elem(map, &hash, &hint, BPF_ANY);
}

/* Whom a hint names, if that backend has not been replaced since; or 0. */
static __always_inline __u32 hinted(void *map, __u64 hash)
{
	struct hint *hint = bpf_map_lookup_elem(map, &hash);
	struct backend *backend;
	__u32 number;

	if (!hint)
		return 0;
	number = hint->backend;
	backend = bpf_map_lookup_elem(&backends, &number);
	if (!backend || generation_of(READ_ONCE(backend->word)) != hint->generation)
		return 0;
	return number;
}

/* Who is asked in an attempt; 0: nobody. Global, as what is called in loops
 * should be: the verifier walks it once. */
__noinline __u32 attempted(const struct ask *ask, __u32 attempt)
{
	struct candidate_row *known;
	__u32 row, at;

	if (!ask)
		return 0;
	if (attempt == ATTEMPT_SLOT)
		return (__u32)ask->slot_word;
	row = ask->slot_word >> SLOT_CANDIDATES_SHIFT;
	if (!row)
		return 0;
	if (attempt == ATTEMPT_HINT)
		return hinted(&hints, ask->flow);
	known = bpf_map_lookup_elem(&candidates, &row);
	at = attempt - ATTEMPT_CANDIDATE;
	if (!known || at >= CANDIDATES_MAX)
		return 0;
	return known->number[at];
}

/* Whether a question of this service and client prefix may be asked again. */
static __always_inline bool affordable(const struct packet *packet, __u32 service)
{
	__u64 prefix = packet->family == 4
			       ? packet->src.w[3] & bpf_htonl(0xffffff00)
			       : packet->src.w[0] |
					 (__u64)(packet->src.w[1] & bpf_htonl(0xffffff00)) << 32;
	__u32 at = ((prefix ^ service) * VIP_BITS_MIX0 >> 40) & BUDGETS_MASK;
	struct budget *budget = bpf_map_lookup_elem(&budgets, &at);
	struct counter *counter = bpf_map_lookup_elem(&service_counters, &service);
	__u64 second = bpf_ktime_get_coarse_ns() >> 30;

	if (!budget || !counter || config.tracing)
		return true;
	if (budget->second != second) {
		budget->second = second;
		budget->packets = counter->packets;
		budget->spent = 0;
	}
	if (budget->spent >=
	    config.budget_floor + (counter->packets - budget->packets) / BUDGET_PART)
		return false;
	budget->spent++;
	return true;
}

/* Whether a TCP flow that nobody has was first denied long enough ago. */
static __always_inline bool unowned_long(__u64 hash)
{
	__u32 at = hash & DENIALS_MASK;
	__u64 *cell = bpf_map_lookup_elem(&denials, &at), word, age;
	__u64 now = bpf_ktime_get_coarse_ns() / 1000000;
	__u64 tag = (hash >> 16) & 0xffff;
	bool ours;

	if (!cell)
		return false;
	word = READ_ONCE(*cell);
	age = word ? now - (word >> 16) : DENIAL_STALE_MS;
	ours = word && (word & 0xffff) == tag;
	if (ours && age >= UNOWNED_MS && age < DENIAL_STALE_MS)
		return true;
	if (!config.tracing && (ours ? age >= DENIAL_STALE_MS : age >= DENIAL_BUSY_MS))
		*(volatile __u64 *)cell = now << 16 | tag;
	return false;
}

/* An order to the slot's backend, or to who stands in for it, `skip` slots
 * further on. */
static __always_inline int order(struct ask *ask, __u32 skip)
{
	__u32 number = (__u32)ask->slot_word;
	struct backend *backend = bpf_map_lookup_elem(&backends, &number);

	ask->verb = VERB_DELIVER;
	ask->attempt = ATTEMPT_ORDER | skip;
	if (!skip && number && backend && usable(READ_ONCE(backend->word))) {
		ask->number = number;
		return DROP_NONE;
	}
	ask->number = stand_in(ask->service_word, ask->slot + skip - !!skip);
	return ask->number ? DROP_NONE : DROP_NO_BACKEND;
}

/* Nobody has the flow. */
static __always_inline int unowned(const struct packet *packet, struct ask *ask)
{
	int drop;

	if (packet->flags & PACKET_ICMP_ERROR)
		return DROP_ICMP_UNRELATED;
	if (packet->proto == IPPROTO_TCP && !(packet->flags & PACKET_SYN) &&
	    !unowned_long(ask->flow))
		return DROP_UNOWNED;
	drop = order(ask, 0);
	if (drop)
		return drop;
	count_event(EVENT_TAKEN);
	if (contested(ask->slot_word))
		write_hint(&hints, ask->flow, ask->number);
	return DROP_NONE;
}

/* Who can be asked in an attempt; 0: nobody. */
__noinline __u32 askable(const struct packet *packet, const struct ask *ask, __u32 attempt)
{
	struct backend *backend;
	__u32 number;

	if (!packet || !ask)
		return 0;
	number = attempted(ask, attempt);
	backend = bpf_map_lookup_elem(&backends, &number);
	if (!number || !backend || !may_own(READ_ONCE(backend->word), packet->proto))
		return 0;
	/* A client does not stay for new connections where none are taken. */
	if (packet->flags & PACKET_SYN && backend_state(READ_ONCE(backend->word)) != BACKEND_ACTIVE)
		return 0;
	return backend->mode == MODE_LOCAL && !ask->owned ? 0 : number;
}

/* Finds who is asked next, from ask->attempt on. Returns 0 or an enum drop. */
__noinline int ask_next(const struct packet *packet, struct ask *ask)
{
	__u32 first;

	if (!packet || !ask)
		return DROP_MALFORMED;
	first = ask->attempt;
	for (__u32 attempt = 0; attempt < ATTEMPTS_MAX; attempt++) {
		__u32 number = attempt < first ? 0 : askable(packet, ask, attempt);

		if (!number)
			continue;
		ask->attempt = attempt;
		ask->number = number;
		ask->verb = VERB_ASK;
		if (attempt == ATTEMPT_HINT)
			count_event(EVENT_HINT);
		if (attempt >= ATTEMPT_CANDIDATE)
			write_hint(&hints, ask->flow, number);
		return DROP_NONE;
	}
	return unowned(packet, ask);
}

/* Of a service that nobody can be asked about: who was on record, else the
 * slot's backend from when the contest began. */
static __always_inline int order_recorded(const struct packet *packet, struct ask *ask)
{
	__u32 number = hinted(&hints, ask->flow);

	if (!number) {
		number = hinted(&syns, ask->flow);
		if (number)
			write_hint(&hints, ask->flow, number);
	}
	if (!number) {
		for (__u32 i = ATTEMPTS_MAX; i > ATTEMPT_CANDIDATE && !number; i--)
			number = askable(packet, ask, i - 1);
		/* On record from now on: whoever had the slot when the contest began
		 * may get it back, and is then no candidate. */
		if (number && affordable(packet, ask->service))
			write_hint(&hints, ask->flow, number);
	}
	if (!number)
		return order(ask, 0);
	ask->verb = VERB_DELIVER;
	ask->attempt = ATTEMPT_ORDER;
	ask->number = number;
	return DROP_NONE;
}

/* A SYN of such a service with affinity: to whom the client is on record, if
 * that takes new flows, else to the slot's backend, which is put on record. */
static __always_inline int order_client(struct ask *ask, __u64 client)
{
	__u32 number = hinted(&hints, client);
	struct backend *backend = bpf_map_lookup_elem(&backends, &number);
	int drop;

	if (number && backend && backend_state(READ_ONCE(backend->word)) == BACKEND_ACTIVE) {
		ask->verb = VERB_DELIVER;
		ask->attempt = ATTEMPT_ORDER;
		ask->number = number;
		return DROP_NONE;
	}
	drop = order(ask, 0);
	if (!drop)
		write_hint(&hints, client, ask->number);
	return drop;
}

/* A packet of a contested slot. Returns 0 or an enum drop. */
static __always_inline int ask_first(const struct packet *packet, struct ask *ask, __u64 slot_hash)
{
	__u32 flags = service_flags(ask->service_word);
	__u64 hash = ask->flow;
	int drop;

	if (packet->flags & PACKET_SYN && (flags & SERVICE_ORDERS || !(flags & SERVICE_AFFINITY))) {
		if (!config.tracing)
			bpf_map_delete_elem(&hints, &hash);
		if (flags & SERVICE_AFFINITY)
			drop = order_client(ask, slot_hash);
		else
			drop = order(ask, 0);
		if (!drop && flags & SERVICE_ORDERS)
			write_hint(&syns, hash, ask->number);
		return drop;
	}
	if (packet->proto == IPPROTO_UDP && flags & SERVICE_INDEPENDENT)
		return order(ask, 0);
	if (flags & SERVICE_ORDERS)
		return order_recorded(packet, ask);
	ask->attempt = ATTEMPT_HINT;
	return ask_next(packet, ask);
}

/* A packet that came back: the next attempt. Returns 0 or an enum drop. */
static __always_inline int ask_again(const struct packet *packet, struct ask *ask, __u32 denier)
{
	__u64 *denied, hash = ask->flow;
	__u32 service = ask->service, skip;
	struct hint *hint;

	if (!affordable(packet, service))
		return DROP_BUDGET;
	hint = bpf_map_lookup_elem(&hints, &hash);
	if (hint && hint->backend == denier && !config.tracing)
		bpf_map_delete_elem(&hints, &hash);
	if (!contested(ask->slot_word) && !config.tracing) {
		denied = bpf_map_lookup_elem(&service_denials, &service);
		if (denied)
			(*denied)++;
	}
	count_event(EVENT_BOUNCE);
	skip = ask->attempt & ~ATTEMPT_ORDER;
	if (!(ask->attempt & ATTEMPT_ORDER)) {
		ask->attempt++;
		return ask_next(packet, ask);
	}
	if (skip >= STAND_INS_MAX)
		return DROP_NO_BACKEND;
	return order(ask, skip + 1);
}
