/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * The truth about flows, at the backend's node: `flows` (confirmed, bounded,
 * each with a timer) and `pending` (LRU). A flood makes entries in `pending`
 * alone, so it pushes out no established flow.
 */
#pragma once

#include "affinity.h"
#include "count.h"
#include "maps.h"
#include "parse.h"
#include <linux/errno.h>

#ifndef CLOCK_MONOTONIC
#define CLOCK_MONOTONIC 1
#endif

/* A pending entry that nobody touched for so long claims nothing. */
#define PENDING_NS (60ULL * 1000000000ULL)

/* Of a connection whose beginning was not seen. */
#define TCP_SCALE_MAX 14

/* What a TCP segment says, host order; all zero for UDP. */
struct segment {
	__u32 seq;
	__u32 end; /* sequence number after its data, SYN and FIN */
	__u32 ack;
	__u16 window;
	__u8 flags; /* TCP_* */
	__u8 scale; /* of a SYN-ACK's window option */
};

static __always_inline __u64 flow_idle(const struct flow_key *key, const struct flow *flow)
{
	if (key->proto == IPPROTO_UDP)
		return config.idle_udp_ns;
	return flow->state == FLOW_CLOSING ? config.idle_closing_ns : config.idle_tcp_ns;
}

/* Packets only store `seen`; the timer that finds it moved waits for the rest. */
static int flow_expire(void *map, struct flow_key *key, struct flow *flow)
{
	__u64 now = bpf_ktime_get_coarse_ns();
	__u64 end = flow->seen + flow_idle(key, flow);

	if (now < end) {
		bpf_timer_start(&flow->timer, end - now, 0);
		return 0;
	}
	bpf_map_delete_elem(&flows, key);
	count_event(EVENT_FLOW_EXPIRED);
	return 0;
}

static __always_inline bool flow_closed(const struct flow *flow)
{
	return flow->fins & FLOW_CLOSED;
}

static __always_inline bool flow_pending(const struct flow *flow)
{
	return flow->state < FLOW_ESTABLISHED;
}

static __always_inline bool flow_of(const struct flow *flow, const struct pod_key *pod)
{
	return flow->pod_port == pod->port && same_addr(&flow->pod, &pod->address);
}

static __always_inline struct flow_key flow_key_of(const struct packet *packet)
{
	return (struct flow_key){.client = packet->src,
				 .vip = packet->dst,
				 .client_port = packet->src_port,
				 .vip_port = packet->dst_port,
				 .proto = packet->proto};
}

/*
 * The entry that speaks for a flow. A closed one does so only as long as no
 * new connection of the same addresses and ports has begun.
 */
static __always_inline struct flow *flow_find(const struct flow_key *key, __u64 now)
{
	struct flow *flow = bpf_map_lookup_elem(&flows, key);
	struct flow *fresh;

	if (flow && flow->state && !flow_closed(flow))
		return flow;
	fresh = bpf_map_lookup_elem(&pending, key);
	if (fresh && now - fresh->seen < PENDING_NS)
		return fresh;
	return flow;
}

/*
 * Whether the Pod already has a flow of this client's address and port by way
 * of another VIP: its answers could not be told apart.
 */
static __always_inline bool flow_conflicts(const struct flow_key *key, const struct pod_key *target,
					   const struct pod *pod, __u64 now)
{
	struct flow_key other = *key;

	for (__u32 i = 0; i < POD_SERVES_MAX; i++) {
		const struct vip_port *serves = &pod->serves[i];
		struct flow *flow;

		if (i >= pod->count)
			break;
		if (serves->port == key->vip_port && same_addr(&serves->vip, &key->vip))
			continue;
		other.vip = serves->vip;
		other.vip_port = serves->port;
		flow = flow_find(&other, now);
		if (flow && !flow_closed(flow) && flow_of(flow, target))
			return true;
	}
	return false;
}

static __always_inline __u8 flow_first_state(__u8 proto, __u8 tcp_flags)
{
	if (proto == IPPROTO_UDP)
		return FLOW_UNANSWERED;
	return tcp_flags & TCP_SYN ? FLOW_HALF_OPEN : FLOW_PROVISIONAL;
}

/* A struct flow is too large for the stack beside those of its callers. */
static const __u8 no_flow[sizeof(struct flow)];

/* Makes the entry of a flow that has none, for the Pod that was named. Until
 * `seen` is there, which comes last, flow_find does not see it. */
static __always_inline int flow_make(const struct flow_key *key, const struct pod_key *target,
				     __u64 hash, __u8 state, __u16 affinity)
{
	struct flow *flow;

	if (bpf_map_update_elem(&pending, key, no_flow, BPF_ANY))
		return DROP_FLOWS_FULL;
	flow = bpf_map_lookup_elem(&pending, key);
	if (!flow)
		return DROP_FLOWS_FULL;
	flow->pod = target->address;
	flow->pod_port = target->port;
	flow->state = state;
	flow->pod_scale = state == FLOW_PROVISIONAL ? TCP_SCALE_MAX : 0;
	flow->affinity = affinity;
	flow->hash = hash;
	barrier();
	flow->seen = bpf_ktime_get_coarse_ns();
	count_event(EVENT_FLOW_NEW);
	return DROP_NONE;
}

/* Starts the timer of a confirmed entry. Some kernels have no memory for it at
 * times: then a later packet of the flow tries again, and what never got one
 * is removed by the agent. */
static __noinline void flow_arm(const struct flow_key *key)
{
	struct flow *flow = bpf_map_lookup_elem(&flows, key);

	if (!flow || flow->fins & FLOW_ARMED ||
	    bpf_timer_init(&flow->timer, &flows, CLOCK_MONOTONIC))
		return;
	if (bpf_timer_set_callback(&flow->timer, flow_expire))
		return;
	flow->fins |= FLOW_ARMED;
	bpf_timer_start(&flow->timer, flow_idle(key, flow), 0);
}

/* Moves an entry from `pending` to `flows`. Until `state` is there, which comes
 * last, flow_find does not see it. */
__noinline int flow_confirm(const struct flow_key *of)
{
	struct flow *flow, *from;
	struct flow_key copy;
	const struct flow_key *key = &copy;
	long err;

	if (!of)
		return DROP_NONE;
	copy = *of; /* before Linux 6.4, an argument cannot be a map's key */
	from = bpf_map_lookup_elem(&pending, key);
	if (!from)
		return DROP_NONE;
	flow = bpf_map_lookup_elem(&flows, key);
	if (flow && flow_closed(flow))
		bpf_map_delete_elem(&flows, key);
	/* Another CPU may have been faster: its entry is as good. */
	err = bpf_map_update_elem(&flows, key, no_flow, BPF_NOEXIST);
	if (err == -EEXIST)
		return DROP_NONE;
	flow = bpf_map_lookup_elem(&flows, key);
	if (err || !flow)
		return DROP_FLOWS_FULL;
	flow->pod = from->pod;
	flow->pod_port = from->pod_port;
	flow->fins = from->fins;
	flow->pod_scale = from->pod_scale;
	flow->affinity = from->affinity;
	flow->hash = from->hash;
	flow->seen = bpf_ktime_get_coarse_ns();
	flow->pod_isn = from->pod_isn;
	flow->pod_ack = from->pod_ack;
	flow->pod_seq = from->pod_seq;
	flow->pod_window = from->pod_window;
	barrier();
	flow->state = FLOW_ESTABLISHED;
	flow_arm(key);
	bpf_map_delete_elem(&pending, key);
	count_event(EVENT_FLOW_CONFIRMED);
	return DROP_NONE;
}

/* The first sign of an end shortens the time that an idle entry is kept. */
static __always_inline void flow_closing(struct flow *flow)
{
	if (flow->state == FLOW_CLOSING)
		return;
	flow->state = FLOW_CLOSING;
	bpf_timer_start(&flow->timer, config.idle_closing_ns, 0);
}

static __always_inline void flow_close(struct flow *flow)
{
	if (flow_closed(flow))
		return;
	flow_closing(flow);
	flow->fins |= FLOW_CLOSED;
	count_event(EVENT_FLOW_CLOSED);
}

static __always_inline bool flow_client_fin_acked(const struct flow *flow)
{
	return flow->fins & FLOW_FIN_CLIENT && flow->pod_ack == flow->client_fin;
}

static __always_inline void flow_close_if_done(struct flow *flow)
{
	if (flow->fins & FLOW_FIN_POD_ACKED && flow_client_fin_acked(flow))
		flow_close(flow);
}

/*
 * What a client's segment says of the end of a confirmed flow. Anyone can
 * send one: a FIN counts only within the Pod's window, and only once the Pod
 * has acknowledged it; a reset only at exactly what the Pod expects next.
 */
static __always_inline void flow_from_client(struct flow *flow, const struct segment *s)
{
	if (s->flags & TCP_RST) {
		if (s->seq == flow->pod_ack)
			flow_close(flow);
		return;
	}
	if (s->end - flow->pod_ack > flow->pod_window + 1)
		return;
	if (s->flags & TCP_FIN) {
		flow->client_fin = s->end;
		flow->fins |= FLOW_FIN_CLIENT;
	}
	if (s->flags & TCP_ACK && flow->fins & FLOW_FIN_POD && s->ack == flow->pod_fin) {
		flow->fins |= FLOW_FIN_POD_ACKED;
		flow_close_if_done(flow);
	}
}

/* What a Pod's SYN-ACK tells, in whatever state the entry is. */
static __always_inline void flow_syn_ack(struct flow *flow, const struct segment *s)
{
	flow->pod_isn = s->seq;
	flow->pod_seq = s->end;
	flow->pod_ack = s->ack;
	flow->pod_scale = s->scale;
	flow->pod_window = s->window; /* never scaled in a SYN-ACK */
	flow->fins |= FLOW_SYN_ACK;
}

/* What a Pod's segment says of a flow: the Pod is believed. */
static __always_inline void flow_from_pod(struct flow *flow, const struct segment *s)
{
	if (s->flags & TCP_RST) {
		if (!flow_pending(flow))
			flow_close(flow);
		return;
	}
	if (!(s->flags & TCP_ACK))
		return;
	if (flow_pending(flow) || (__s32)(s->ack - flow->pod_ack) > 0)
		flow->pod_ack = s->ack;
	if (flow_pending(flow) || (__s32)(s->end - flow->pod_seq) > 0)
		flow->pod_seq = s->end;
	flow->pod_window = (__u32)s->window << (flow->pod_scale & 15);
	if (flow_pending(flow))
		return;
	if (s->flags & TCP_FIN) {
		flow->pod_fin = s->end;
		flow->fins |= FLOW_FIN_POD;
		flow_closing(flow);
	}
	if (flow_client_fin_acked(flow)) {
		flow_closing(flow);
		flow_close_if_done(flow);
	}
}

/* How far behind what the Pod has acknowledged a repeated segment may be. */
#define REPEATS_BYTES (1U << 20)

/*
 * Whether a segment can be of the connection that an entry is about. So what
 * is left of an old connection, and blind packets, claim nothing; and of two
 * half-open entries that a repeated SYN made, only the one whose SYN-ACK the
 * client answers.
 */
static __always_inline bool flow_claims(const struct flow *flow, const struct segment *s)
{
	__u32 ahead = s->end - flow->pod_ack, behind = flow->pod_ack - s->seq;
	__u32 window = flow->pod_window > REPEATS_BYTES ? flow->pod_window : REPEATS_BYTES;

	if (flow->state == FLOW_HALF_OPEN) {
		if ((s->flags & (TCP_SYN | TCP_ACK | TCP_RST)) == TCP_SYN)
			return true; /* repeated; where affinity makes it a question */
		if (!(flow->fins & FLOW_SYN_ACK))
			return false;
		if (s->flags & TCP_RST)
			return s->seq == flow->pod_ack;
		return s->flags & TCP_ACK && s->ack == flow->pod_isn + 1;
	}
	if (flow_closed(flow)) /* its last words, repeated */
		return flow->fins & FLOW_FIN_CLIENT &&
		       (s->end == flow->client_fin || s->seq == flow->client_fin);
	return flow->state == FLOW_PROVISIONAL || ahead <= flow->pod_window + 1 || behind <= window;
}
