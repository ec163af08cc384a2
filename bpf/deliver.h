/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * A client's packet on its last step: to a Pod of this node, up the stack, so
 * that connection tracking and policies see it. An existing flow decides which
 * Pod; without one, the Pod that was named.
 */
#pragma once

#include "cookie.h"
#include "flow.h"
#include "fragment.h"
#include "icmp.h"
#include <stddef.h>

/* What a client's TCP packet tells. Returns false when it cannot be read. */
static __always_inline bool client_segment(struct xdp_md *ctx, const struct packet *packet,
					   struct segment *segment)
{
	struct tcphdr *tcp = (void *)(long)ctx->data + (packet->l4 & OFFSET_MASK);
	__u8 flags;
	__u32 header;

	if ((void *)(tcp + 1) > (void *)(long)ctx->data_end)
		return false;
	flags = ((__u8 *)tcp)[13];
	header = packet->l4 - packet->l3 + tcp->doff * 4;
	if (tcp->doff < 5 || header > packet->length)
		return false;
	segment->seq = bpf_ntohl(tcp->seq);
	segment->end =
		segment->seq + packet->length - header + !!(flags & TCP_SYN) + !!(flags & TCP_FIN);
	segment->ack = bpf_ntohl(tcp->ack_seq);
	segment->window = bpf_ntohs(tcp->window);
	segment->flags = flags;
	return true;
}

/* Neither delivered nor dropped: this node has no such flow, or no such Pod. */
#define CLAIM_DENIED (-1)
/* In place of a verb: an order that begins a flow whatever there was. */
#define CLAIM_PROBE 0x80
/* And above that, the packet's TCP flags: it has no flow, and may begin one. */
#define CLAIM_BEGINS 0x200
/* The same ends had a connection before. */
#define CLAIM_AGAIN 0x100

/* Whether a packet without a flow begins one that its client's affinity may
 * decide about. */
static __always_inline bool may_follow(__u8 proto, __u32 tcp_flags)
{
	return proto == IPPROTO_UDP || (tcp_flags & (TCP_SYN | TCP_ACK | TCP_RST)) == TCP_SYN;
}

/* A flow that has no entry: makes one for the Pod that its client has already,
 * or when this is an order, for the one that was named, if it is of this node
 * and serves this VIP. In *pod is then the Pod. `call` is the verb, and the
 * packet's TCP flags above it. Returns 0, CLAIM_DENIED or an enum drop. */
__noinline int admit(const struct packet *packet, struct pod_key *pod, __u64 hash, __u32 call)
{
	bool asked = (call & 0xff) == VERB_ASK, follows;
	const struct vip_port *serves;
	struct pod_key target;
	struct flow_key key;
	__u32 flags = call >> 8;
	struct pod *of;
	__u8 state;

	/* A datagram that is asked about may be of a flow that another node has: only
	 * flows are looked for then, not clients. */
	if (!packet || !pod ||
	    (asked && (packet->proto == IPPROTO_UDP || !may_follow(packet->proto, flags))))
		return CLAIM_DENIED;
	target = *pod; /* before Linux 6.4, an argument cannot be a map's key */
	key = flow_key_of(packet);
	of = bpf_map_lookup_elem(&pods, &target);
	if (!of)
		return CLAIM_DENIED; /* not known yet */
	serves = pod_serves(of, &key.vip, key.vip_port);
	if (!serves)
		return asked ? CLAIM_DENIED : DROP_TUNNEL_VIP;
	follows = hash && serves->affinity && may_follow(key.proto, flags) &&
		  affinity_find(&key, &target);
	if (asked && !follows)
		return CLAIM_DENIED;
	if (follows)
		of = bpf_map_lookup_elem(&pods, &target);
	if (!of)
		return CLAIM_DENIED;
	if (flow_conflicts(&key, &target, of, bpf_ktime_get_coarse_ns()))
		return DROP_FLOW_CONFLICT;
	*pod = target;
	state = flow_first_state(key.proto, flags);
	TRACE(flow_state, state);
	if (config.tracing)
		return DROP_NONE;
	return flow_make(&key, &target, hash, state, hash ? serves->affinity : 0);
}

/* What the packet tells of the flow that it belongs to. Returns an enum drop. */
static __always_inline int note_client(const struct flow_key *key, struct flow *flow,
				       const struct segment *segment, __u64 now)
{
	if (config.tracing)
		return DROP_NONE;
	flow->seen = now;
	if (!flow_pending(flow) && !(flow->fins & FLOW_ARMED))
		flow_arm(key);
	if (key->proto == IPPROTO_UDP)
		return DROP_NONE;
	if (!flow_pending(flow)) {
		flow_from_client(flow, segment);
		return DROP_NONE;
	}
	/* Only the ACK of exactly this entry's SYN-ACK proves the connection. */
	if (flow->state == FLOW_HALF_OPEN && flow->fins & FLOW_SYN_ACK &&
	    (segment->flags & (TCP_SYN | TCP_ACK)) == TCP_ACK && segment->ack == flow->pod_isn + 1)
		return flow_confirm(key);
	return DROP_NONE;
}

/* A SYN, or an answerable packet, of a flow that has ended: it begins anew. */
static __always_inline bool begins(const struct flow *flow, const struct segment *segment,
				   __u8 proto)
{
	if (!flow)
		return true;
	return proto == IPPROTO_TCP && flow_closed(flow) &&
	       (segment->flags & (TCP_SYN | TCP_ACK | TCP_RST)) == TCP_SYN;
}

/* Destination VIP:port becomes Pod:port, with the checksums. */
static __noinline bool translate_client(struct xdp_md *ctx, const struct packet *packet,
					const struct pod_key *pod)
{
	void *data = (void *)(long)ctx->data, *data_end = (void *)(long)ctx->data_end;
	void *l3 = data + (packet->l3 & OFFSET_MASK), *l4 = data + (packet->l4 & OFFSET_MASK);
	__u32 from = addr_sum(&packet->dst), to = addr_sum(&pod->address);
	__u16 *check;

	if (packet->family == 4) {
		struct iphdr *ip = l3;

		if ((void *)(ip + 1) > data_end)
			return false;
		ip->daddr = pod->address.w[3];
		ip->check = move_sum(ip->check, from, to);
	} else {
		struct ipv6hdr *ip = l3;

		if ((void *)(ip + 1) > data_end)
			return false;
		__builtin_memcpy(&ip->daddr, &pod->address, sizeof(ip->daddr));
	}
	if (packet->flags & PACKET_LATER_FRAGMENT)
		return true;
	from += packet->dst_port;
	to += pod->port;
	if (packet->proto == IPPROTO_TCP) {
		struct tcphdr *tcp = l4;

		if ((void *)(tcp + 1) > data_end)
			return false;
		tcp->dest = pod->port;
		check = &tcp->check;
	} else {
		struct udphdr *udp = l4;

		if ((void *)(udp + 1) > data_end)
			return false;
		udp->dest = pod->port;
		check = &udp->check;
		if (!*check)
			return true; /* none was sent (RFC 768) */
	}
	*check = move_sum(*check, from, to);
	if (packet->proto == IPPROTO_UDP && !*check)
		*check = 0xffff;
	return true;
}

/*
 * An ICMP error about a Pod's packet: the quoted source VIP:port becomes
 * Pod:port, and so does the error's own destination. The quoted transport
 * checksum stays as it was: often it is not quoted, and nobody checks it.
 */
static __noinline bool translate_error(struct xdp_md *ctx, const struct packet *packet,
				       const struct addr *vip, const struct pod_key *pod)
{
	void *data = (void *)(long)ctx->data, *data_end = (void *)(long)ctx->data_end;
	__u32 from, to;
	struct icmp *icmp;
	__be16 *port;
	__u32 l3;

	if (!packet || !vip || !pod || packet->l4 > OFFSET_MASK)
		return false;
	l3 = (packet->l4 + sizeof(*icmp)) & OFFSET_MASK;
	icmp = data + (packet->l4 & OFFSET_MASK);
	port = data + (packet->quoted & OFFSET_MASK);
	if ((void *)(icmp + 1) > data_end || (void *)(port + 1) > data_end)
		return false;
	from = addr_sum(vip);
	to = addr_sum(&pod->address);
	*port = pod->port;
	if (packet->family == 4) {
		struct iphdr *ip = data + (packet->l3 & OFFSET_MASK), *inner = data + l3;

		if ((void *)(ip + 1) > data_end || (void *)(inner + 1) > data_end)
			return false;
		ip->daddr = pod->address.w[3];
		ip->check = move_sum(ip->check, from, to);
		inner->saddr = pod->address.w[3];
		inner->check = move_sum(inner->check, from, to);
		/* The quoted header's sum, with its checksum, has not changed. */
		icmp->check = move_sum(icmp->check, packet->dst_port, pod->port);
		return true;
	}
	{
		struct ipv6hdr *ip = data + (packet->l3 & OFFSET_MASK), *inner = data + l3;

		if ((void *)(ip + 1) > data_end || (void *)(inner + 1) > data_end)
			return false;
		__builtin_memcpy(&ip->daddr, &pod->address, sizeof(ip->daddr));
		__builtin_memcpy(&inner->saddr, &pod->address, sizeof(inner->saddr));
		/* Once in the pseudo-header, once in the quoted header. */
		icmp->check =
			move_sum(icmp->check, 2 * from + packet->dst_port, 2 * to + pod->port);
	}
	return true;
}

/* The Pod that owns a packet's flow, in *pod. Returns 0, CLAIM_DENIED, an enum
 * drop, or CLAIM_BEGINS and the TCP flags. */
__noinline int claim_known(struct xdp_md *ctx, const struct packet *packet, struct pod_key *pod,
			   __u32 verb)
{
	__u64 now = bpf_ktime_get_coarse_ns();
	struct segment segment = {};
	struct flow_key key;
	struct flow *flow;
	bool error;

	if (!packet || !pod)
		return DROP_MALFORMED;
	error = packet->flags & PACKET_ICMP_ERROR;
	key = flow_key_of(packet);
	if (!error && packet->proto == IPPROTO_TCP && !(packet->flags & PACKET_LATER_FRAGMENT) &&
	    !client_segment(ctx, packet, &segment))
		return DROP_MALFORMED;
	flow = flow_find(&key, now);
	if (error && (!flow || flow_closed(flow)))
		return verb == VERB_ASK ? CLAIM_DENIED : DROP_ICMP_UNRELATED;
	if (verb == CLAIM_PROBE && !error && may_follow(packet->proto, segment.flags)) {
		if (!config.tracing)
			bpf_map_delete_elem(&flows, &key);
		flow = NULL;
	}
	if (!error && begins(flow, &segment, packet->proto))
		return CLAIM_BEGINS + segment.flags + (flow ? CLAIM_AGAIN : 0);
	if (!flow)
		return DROP_MALFORMED;
	if (verb == VERB_ASK && packet->proto == IPPROTO_TCP &&
	    !(packet->flags & (PACKET_ICMP_ERROR | PACKET_LATER_FRAGMENT)) &&
	    !flow_claims(flow, &segment))
		return CLAIM_DENIED;
	pod->address = flow->pod;
	pod->port = flow->pod_port;
	TRACE(flow_state, flow->state);
	TRACE_STEP(TRACE_FLOW);
	return error ? DROP_NONE : note_client(&key, flow, &segment, now);
}

/*
 * Who on this node gets a packet, in which the flow stands as the client has it
 * (also when it is an ICMP error about it): the Pod that owns the flow, or when
 * it is an order, the one that was named in *pod. Returns 0, CLAIM_DENIED,
 * CLAIM_COOKIE or an enum drop.
 */
static __always_inline int claim(struct xdp_md *ctx, const struct packet *packet,
				 struct pod_key *pod, __u64 hash, __u8 verb)
{
	int drop = claim_known(ctx, packet, pod, verb);

	__u32 call;

	if (drop < CLAIM_BEGINS)
		return drop;
	call = (drop - CLAIM_BEGINS) << 8 | verb;
	if (config.cookies && packet->proto == IPPROTO_TCP && verb != CLAIM_PROBE) {
		drop = cookie(ctx, packet, pod, hash, call);
		if (drop != COOKIE_NONE)
			return drop;
	}
	return admit(packet, pod, hash, call);
}

/* Hands a packet to the Pod that it was claimed for. Returns an XDP action. */
__noinline int deliver(struct xdp_md *ctx, const struct packet *packet, const struct pod_key *pod)
{
	bool held;

	if (!packet || !pod)
		return xdp_drop(DROP_MALFORMED);
	TRACING(to->pod = pod->address; to->pod_port = pod->port; to->verdict = VERDICT_DELIVER);
	held = same_addr(&pod->address, &packet->dst) && pod->port == packet->dst_port;
	if (!held &&
	    !(packet->flags & PACKET_ICMP_ERROR ? translate_error(ctx, packet, &packet->dst, pod)
						: translate_client(ctx, packet, pod)))
		return xdp_drop(DROP_MALFORMED);
	count_event(EVENT_DELIVERED);
	return XDP_PASS;
}
