/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Whose a client is: with ClientIP affinity, its new flows go to the Pod that
 * has the older ones. Only a Pod's answers in confirmed flows make an entry and
 * keep it, so a flood of spoofed addresses makes none.
 */
#pragma once

#include "count.h"
#include "parse.h"
#include <stddef.h>

#define AFFINITY_REFRESH_NS 1000000000ULL

static __always_inline __u64 affinity_ns(__u16 code)
{
	__u64 seconds = code & AFFINITY_COARSE ? (code & (AFFINITY_COARSE - 1)) * 4ULL : code;

	return seconds * 1000000000ULL;
}

static __always_inline bool affinity_fresh(const struct affinity *entry, __u64 now)
{
	return entry->seen && now - entry->seen < affinity_ns(entry->affinity);
}

/* What a Pod serves as this VIP and port; NULL when it does not. */
static __always_inline const struct vip_port *pod_serves(const struct pod *pod,
							 const struct addr *vip, __be16 port)
{
	for (__u32 i = 0; i < POD_SERVES_MAX; i++) {
		if (i >= pod->count)
			break;
		if (pod->serves[i].port == port && same_addr(&pod->serves[i].vip, vip))
			return &pod->serves[i];
	}
	return NULL;
}

/* The affinity of a Pod's service, 0 when there is none: a Pod that is leaving
 * has none. */
static __noinline __u16 pod_affinity(const struct pod_key *of, const struct flow_key *flow)
{
	const struct vip_port *serves;
	struct pod *pod;

	if (!of || !flow)
		return 0;
	pod = bpf_map_lookup_elem(&pods, of);
	serves = pod ? pod_serves(pod, &flow->vip, flow->vip_port) : NULL;
	return serves ? serves->affinity : 0;
}

/* The entry of a flow's client. The key is lent: there is no stack for two. */
static __always_inline struct affinity *affinity_of(struct flow_key *flow)
{
	__be16 port = flow->client_port;
	struct affinity *entry;

	flow->client_port = 0;
	entry = bpf_map_lookup_elem(&affinities, flow);
	flow->client_port = port;
	return entry;
}

/* Puts the Pod that a flow's client has already in *pod, if there is one. */
static __noinline bool affinity_find(struct flow_key *flow, struct pod_key *pod)
{
	struct affinity *entry;
	struct pod_key owner;

	if (!flow || !pod)
		return false;
	entry = affinity_of(flow);
	if (!entry || !affinity_fresh(entry, bpf_ktime_get_coarse_ns()))
		return false;
	owner = *pod;
	owner.address = entry->pod;
	owner.port = entry->pod_port;
	if (!pod_affinity(&owner, flow))
		return false;
	*pod = owner;
	count_event(EVENT_AFFINITY);
	return true;
}

static const struct affinity no_affinity;

/* A flow's Pod has its client, from now on or still, unless another Pod has. */
static __noinline void affinity_note(struct flow_key *flow, const struct pod_key *pod, __u64 hash)
{
	__u64 now = bpf_ktime_get_coarse_ns();
	struct affinity *entry;
	struct pod_key owner;
	__u16 affinity;
	__be16 port;
	bool ours;

	if (!flow || !pod || config.tracing)
		return;
	entry = affinity_of(flow);
	ours = entry && entry->pod_port == pod->port && same_addr(&entry->pod, &pod->address);
	if (ours && now - entry->seen < AFFINITY_REFRESH_NS)
		return;
	owner = *pod; /* before Linux 6.4, an argument cannot be a map's key */
	affinity = pod_affinity(&owner, flow);
	if (!affinity)
		return;
	if (entry && !ours && affinity_fresh(entry, now)) {
		owner.address = entry->pod;
		owner.port = entry->pod_port;
		if (pod_affinity(&owner, flow))
			return;
	}
	if (!entry) {
		port = flow->client_port;
		flow->client_port = 0;
		if (bpf_map_update_elem(&affinities, flow, &no_affinity, BPF_NOEXIST))
			count_event(EVENT_AFFINITIES_FULL);
		entry = bpf_map_lookup_elem(&affinities, flow);
		flow->client_port = port;
	}
	if (!entry)
		return;
	entry->pod = pod->address;
	entry->pod_port = pod->port;
	entry->affinity = affinity;
	entry->hash = hash;
	entry->seen = now;
}
