/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * SYN cookies at the backend's node: while a Pod's port gets more SYNs than it
 * should, they are answered here, and only who answers that becomes a flow. The
 * cookies are those of the kernel, which takes them from a listener where
 * net.ipv4.tcp_syncookies is 2, or that has sent one within two minutes: so one
 * SYN a minute is let through.
 */
#pragma once

#include "flow.h"
#include "icmp.h"
#include <stddef.h>

/* The SYN is to be answered by send_cookie. */
#define CLAIM_COOKIE (-2)
/* It is none of this file's business. */
#define COOKIE_NONE 0x200
/* In a call: the same ends had a connection before. */
#define COOKIE_AGAIN (0x100 << 8)

#define COOKIE_FORCE_NS (2ULL * 1000000000ULL)	  /* after the last SYN too many */
#define COOKIE_GOOD_NS (120ULL * 1000000000ULL)	  /* as long as the kernel takes them */
#define COOKIE_THROUGH_NS (60ULL * 1000000000ULL) /* from one SYN let through to the next */
#define COOKIE_MSS_BYTES 4
#define COOKIE_WINDOW 64240
#define TCP_HEADER_MAX 60

/* What the kernel's functions take: headers as the server sees them. */
struct cookie_tcp {
	struct tcphdr tcp;
	__u8 options[TCP_HEADER_MAX - sizeof(struct tcphdr)];
};

static __always_inline bool plain_header(const struct packet *packet)
{
	return packet->l4 - packet->l3 ==
	       (packet->family == 4 ? sizeof(struct iphdr) : sizeof(struct ipv6hdr));
}

static __always_inline bool cookie_due(struct flood *flood, __u64 now)
{
	__u64 second = now / 1000000000ULL;

	if (flood->second != second) {
		flood->second = second;
		flood->syns = 0;
	}
	if (__sync_fetch_and_add(&flood->syns, 1) >= flood->threshold)
		flood->until = now + COOKIE_FORCE_NS;
	if (now >= flood->until)
		return false;
	if (now - flood->through < COOKIE_THROUGH_NS)
		return true;
	flood->through = now;
	return false;
}

static __always_inline void cookie_ip4(struct iphdr *ip, const struct packet *packet,
				       const struct pod_key *pod)
{
	ip->saddr = packet->src.w[3];
	ip->daddr = pod->address.w[3];
}

static __always_inline void cookie_ip6(struct ipv6hdr *ip, const struct packet *packet,
				       const struct pod_key *pod)
{
	__builtin_memcpy(&ip->saddr, &packet->src, sizeof(ip->saddr));
	__builtin_memcpy(&ip->daddr, &pod->address, sizeof(ip->daddr));
}

/* Whether a segment answers a cookie of this Pod's port. */
__noinline int cookie_valid(struct xdp_md *ctx, const struct packet *packet,
			    const struct pod_key *pod)
{
	struct tcphdr tcp;
	struct ipv6hdr ip6 = {};
	struct iphdr ip4 = {};

	if (!packet || !pod || bpf_xdp_load_bytes(ctx, packet->l4 & OFFSET_MASK, &tcp, sizeof(tcp)))
		return 0;
	tcp.dest = pod->port;
	if (packet->family == 4) {
		cookie_ip4(&ip4, packet, pod);
		return !bpf_tcp_raw_check_syncookie_ipv4(&ip4, &tcp);
	}
	cookie_ip6(&ip6, packet, pod);
	return !bpf_tcp_raw_check_syncookie_ipv6(&ip6, &tcp);
}

/* The connection that a cookie stood for, as if its handshake had been seen. */
static __always_inline int cookie_flow(struct xdp_md *ctx, const struct packet *packet,
				       const struct pod_key *target, __u64 hash, __u16 affinity)
{
	struct flow_key key = flow_key_of(packet);
	struct tcphdr tcp;
	struct flow *flow;
	int drop;

	if (config.tracing)
		return DROP_NONE;
	if (bpf_xdp_load_bytes(ctx, packet->l4 & OFFSET_MASK, &tcp, sizeof(tcp)))
		return DROP_MALFORMED;
	drop = flow_make(&key, target, hash, FLOW_HALF_OPEN, affinity);
	flow = bpf_map_lookup_elem(&pending, &key);
	if (drop || !flow)
		return DROP_FLOWS_FULL;
	flow->pod_isn = bpf_ntohl(tcp.ack_seq) - 1;
	flow->pod_seq = bpf_ntohl(tcp.ack_seq);
	flow->pod_ack = bpf_ntohl(tcp.seq);
	flow->pod_window = COOKIE_WINDOW;
	flow->fins = FLOW_SYN_ACK;
	count_event(EVENT_COOKIE_ACCEPTED);
	return flow_confirm(&key);
}

/* A packet that has no flow, for a Pod that may be flooded. `call` is as admit
 * has it. Returns CLAIM_COOKIE, 0 when the flow is made, an enum drop, or
 * COOKIE_NONE. */
__noinline int cookie(struct xdp_md *ctx, const struct packet *packet, const struct pod_key *pod,
		      __u64 hash, __u32 call)
{
	__u32 flags = (call >> 8) & (TCP_SYN | TCP_ACK | TCP_RST);
	__u64 now = bpf_ktime_get_coarse_ns();
	const struct vip_port *serves;
	struct pod_key target;
	struct flood *flood;
	struct pod *of;

	/* Whoever had a connection before is no made-up client; and its server may
	 * remember that one (TIME-WAIT), which only a SYN ends. */
	if (!packet || !pod || !plain_header(packet) || call & COOKIE_AGAIN)
		return COOKIE_NONE;
	target = *pod; /* before Linux 6.4, an argument cannot be a map's key */
	flood = bpf_map_lookup_elem(&floods, &target);
	of = flood ? bpf_map_lookup_elem(&pods, &target) : NULL;
	serves = of ? pod_serves(of, &packet->dst, packet->dst_port) : NULL;
	if (!flood || !serves)
		return COOKIE_NONE;
	if (flags == TCP_SYN)
		return !config.tracing && cookie_due(flood, now) ? CLAIM_COOKIE : COOKIE_NONE;
	if (flags != TCP_ACK || !flood->until || now > flood->until + COOKIE_GOOD_NS ||
	    !cookie_valid(ctx, packet, pod))
		return COOKIE_NONE;
	return cookie_flow(ctx, packet, &target, hash, hash ? serves->affinity : 0);
}

/* The cookie for a SYN; negative when there is none. */
__noinline __s64 make_cookie(struct xdp_md *ctx, const struct packet *packet,
			     const struct pod_key *pod)
{
	struct cookie_tcp head = {};
	struct ipv6hdr ip6 = {};
	struct iphdr ip4 = {};
	__u32 length;

	if (!packet || !pod ||
	    bpf_xdp_load_bytes(ctx, packet->l4 & OFFSET_MASK, &head.tcp, sizeof(head.tcp)))
		return -1;
	length = head.tcp.doff * 4;
	if (length < sizeof(head.tcp) || length > sizeof(head))
		return -1;
	if (length > sizeof(head.tcp) &&
	    bpf_xdp_load_bytes(ctx, (packet->l4 & OFFSET_MASK) + sizeof(head.tcp), head.options,
			       length - sizeof(head.tcp)))
		return -1;
	head.tcp.dest = pod->port;
	if (packet->family == 4) {
		cookie_ip4(&ip4, packet, pod);
		return bpf_tcp_raw_gen_syncookie_ipv4(&ip4, &head.tcp, length);
	}
	cookie_ip6(&ip6, packet, pod);
	return bpf_tcp_raw_gen_syncookie_ipv6(&ip6, &head.tcp, length);
}

static __always_inline void cookie_segment(struct tcphdr *tcp, const struct packet *packet,
					   __u32 cookie, __be32 seq, __u16 mss)
{
	__u8 *option = (void *)(tcp + 1);

	__builtin_memset(tcp, 0, sizeof(*tcp) + COOKIE_MSS_BYTES);
	tcp->source = packet->dst_port;
	tcp->dest = packet->src_port;
	tcp->seq = bpf_htonl(cookie);
	tcp->ack_seq = bpf_htonl(bpf_ntohl(seq) + 1);
	tcp->doff = (sizeof(*tcp) + COOKIE_MSS_BYTES) / 4;
	tcp->syn = 1;
	tcp->ack = 1;
	tcp->window = bpf_htons(COOKIE_WINDOW);
	option[0] = 2;
	option[1] = COOKIE_MSS_BYTES;
	option[2] = mss >> 8;
	option[3] = mss;
	tcp->check = ~fold(addr_sum(&packet->src) + addr_sum(&packet->dst) +
			   bpf_htons(IPPROTO_TCP) + bpf_htons(sizeof(*tcp) + COOKIE_MSS_BYTES) +
			   add_words((void *)tcp, (sizeof(*tcp) + COOKIE_MSS_BYTES) / 2));
}

/* The SYN's frame becomes the answer with the cookie. */
static __always_inline bool write_cookie(struct xdp_md *ctx, const struct packet *packet,
					 __u32 cookie)
{
	void *data = (void *)(long)ctx->data, *data_end = (void *)(long)ctx->data_end;
	void *l3 = data + (packet->l3 & OFFSET_MASK);
	const __u32 bytes = sizeof(struct tcphdr) + COOKIE_MSS_BYTES;
	struct tcphdr *tcp;
	__be32 seq;

	if (packet->family == 4) {
		struct iphdr *ip = l3;

		tcp = (void *)(ip + 1);
		if ((void *)tcp + bytes > data_end)
			return false;
		seq = tcp->seq;
		__builtin_memset(ip, 0, sizeof(*ip));
		ip->version = 4;
		ip->ihl = 5;
		ip->tot_len = bpf_htons(sizeof(*ip) + bytes);
		ip->frag_off = bpf_htons(IPV4_DONT_FRAGMENT);
		ip->ttl = REPLY_TTL;
		ip->protocol = IPPROTO_TCP;
		ip->saddr = packet->dst.w[3];
		ip->daddr = packet->src.w[3];
		ip->check = ~fold(add_words((void *)ip, sizeof(*ip) / 2));
		cookie_segment(tcp, packet, cookie, seq, config.mss4 ? config.mss4 : 1460);
	} else {
		struct ipv6hdr *ip = l3;

		tcp = (void *)(ip + 1);
		if ((void *)tcp + bytes > data_end)
			return false;
		seq = tcp->seq;
		__builtin_memset(ip, 0, sizeof(*ip));
		ip->version = 6;
		ip->payload_len = bpf_htons(bytes);
		ip->nexthdr = IPPROTO_TCP;
		ip->hop_limit = REPLY_TTL;
		__builtin_memcpy(&ip->saddr, &packet->dst, sizeof(ip->saddr));
		__builtin_memcpy(&ip->daddr, &packet->src, sizeof(ip->daddr));
		cookie_segment(tcp, packet, cookie, seq, config.mss6 ? config.mss6 : 1440);
	}
	return true;
}

/* Where an answer of the VIP's to the client leaves, into the frame's own
 * addresses. Returns the device, or 0. */
__noinline __u32 cookie_way(struct xdp_md *ctx, const struct packet *packet)
{
	struct bpf_fib_lookup fib = {.ifindex = ctx->ingress_ifindex};
	struct ethhdr *eth;

	if (!packet)
		return 0;
	if (packet->family == 4) {
		fib.family = 2; /* AF_INET */
		fib.ipv4_src = packet->dst.w[3];
		fib.ipv4_dst = packet->src.w[3];
	} else {
		fib.family = 10; /* AF_INET6 */
		__builtin_memcpy(fib.ipv6_src, &packet->dst, sizeof(fib.ipv6_src));
		__builtin_memcpy(fib.ipv6_dst, &packet->src, sizeof(fib.ipv6_dst));
	}
	if (bpf_fib_lookup(ctx, &fib, sizeof(fib), 0) != BPF_FIB_LKUP_RET_SUCCESS)
		return 0;
	eth = (void *)(long)ctx->data;
	if ((void *)(eth + 1) > (void *)(long)ctx->data_end)
		return 0;
	__builtin_memcpy(eth->h_dest, fib.dmac, ETH_ALEN);
	__builtin_memcpy(eth->h_source, fib.smac, ETH_ALEN);
	return fib.ifindex;
}

/* Answers a SYN that claim said CLAIM_COOKIE of, in its own frame, out of which
 * the tunnel has been taken. Returns an XDP action. */
__noinline int send_cookie(struct xdp_md *ctx, const struct packet *packet,
			   const struct pod_key *pod)
{
	const __u32 bytes = sizeof(struct tcphdr) + COOKIE_MSS_BYTES;
	__u32 total, out;
	__s64 cookie;

	if (!packet || !pod)
		return XDP_DROP;
	cookie = make_cookie(ctx, packet, pod);
	out = cookie_way(ctx, packet);
	if (cookie < 0 || !out)
		return xdp_drop(DROP_COOKIE);
	total = bpf_xdp_get_buff_len(ctx);
	if (bpf_xdp_adjust_tail(ctx, (int)(packet->l4 + bytes) - (int)total) ||
	    !write_cookie(ctx, packet, (__u32)cookie))
		return xdp_drop(DROP_COOKIE);
	count_event(EVENT_COOKIE_SENT);
	TRACING(to->verdict = VERDICT_REPLY);
	return out == ctx->ingress_ifindex ? XDP_TX : bpf_redirect(out, 0);
}
