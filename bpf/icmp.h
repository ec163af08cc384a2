/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * ICMP and ICMPv6: which flow an error is about, and the replies that the LB
 * node itself makes: to echo requests, and Packet Too Big (Fragmentation
 * Needed) and Time Exceeded. At most one packet out for one in.
 */
#pragma once

#include "count.h"
#include "parse.h"

#define REPLY_TTL 64
#define ICMP_BYTES 8
/* How much of a packet an error quotes, at most; even, for the checksumsum. */
#define QUOTE_BYTES 128

static __always_inline __u16 fold(__u32 sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	return sum + (sum >> 16);
}

/* `check` for content that changed from one sum to another. */
static __always_inline __u16 move_sum(__u16 check, __u32 from, __u32 to)
{
	return ~fold((__u16)~check + (__u16)~fold(from) + fold(to));
}

static __always_inline __u32 add_words(const __u16 *from, int words)
{
	__u32 sum = 0;

	for (int i = 0; i < words; i++)
		sum += from[i];
	return sum;
}

/* One's complement sum of the bytes of an address, as 16-bit words. */
static __always_inline __u32 addr_sum(const struct addr *a)
{
	return add_words((const __u16 *)a, sizeof(*a) / 2);
}

static __always_inline void swap_macs(struct ethhdr *eth)
{
	__u8 mac[ETH_ALEN];

	__builtin_memcpy(mac, eth->h_dest, ETH_ALEN);
	__builtin_memcpy(eth->h_dest, eth->h_source, ETH_ALEN);
	__builtin_memcpy(eth->h_source, mac, ETH_ALEN);
}

/*
 * An error's quoted packet names the flow: it was sent by the VIP to the
 * client. Puts the flow, as the client's packets have it, in place of the
 * error's own addresses and ports.
 */
__noinline int quoted_flow(struct xdp_md *ctx, struct packet *packet)
{
	void *data = (void *)(long)ctx->data, *data_end = (void *)(long)ctx->data_end;
	struct packet quoted;
	__be16 type;

	if (!packet || packet->l4 + ICMP_BYTES > OFFSET_MASK)
		return DROP_MALFORMED;
	/* What it quotes may be in another fragment, or be made up. */
	if (packet->flags & PACKET_FIRST_FRAGMENT)
		return DROP_ICMP_UNRELATED;
	type = packet->family == 4 ? bpf_htons(ETH_P_IP) : bpf_htons(ETH_P_IPV6);
	if (parse_quoted(data, data_end, (packet->l4 + ICMP_BYTES) & OFFSET_MASK, type, &quoted))
		return DROP_MALFORMED;
	if (!same_addr(&quoted.src, &packet->dst) || quoted.flags & PACKET_LATER_FRAGMENT ||
	    (quoted.proto != IPPROTO_TCP && quoted.proto != IPPROTO_UDP))
		return DROP_ICMP_UNRELATED;
	packet->src = quoted.dst;
	packet->src_port = quoted.dst_port;
	packet->dst_port = quoted.src_port;
	packet->proto = quoted.proto;
	packet->quoted = quoted.l4;
	return 0;
}

/* Somebody says that a tunnel packet of this node's could not be delivered. Who
 * it was for is probed soon; no more, since anybody can say so. The packet
 * itself is for the kernel. */
__noinline int note_unreachable(struct xdp_md *ctx, struct packet *packet)
{
	void *data = (void *)(long)ctx->data, *data_end = (void *)(long)ctx->data_end;
	__u64 now = bpf_ktime_get_coarse_ns();
	struct packet quoted;
	struct addr where;
	__u8 kind[2]; /* type and code */
	__be16 type;

	if (!packet || config.tracing || parse_transport(data, data_end, packet, false) ||
	    !(packet->flags & PACKET_ICMP_ERROR) || packet->l4 + ICMP_BYTES > OFFSET_MASK ||
	    bpf_xdp_load_bytes(ctx, packet->l4, kind, sizeof(kind)))
		return 0;
	if (kind[0] != (packet->family == 4 ? ICMP_DEST_UNREACH : ICMPV6_DEST_UNREACH) ||
	    (packet->family == 4 && kind[1] == ICMP_FRAG_NEEDED))
		return 0;
	type = packet->family == 4 ? bpf_htons(ETH_P_IP) : bpf_htons(ETH_P_IPV6);
	if (parse_quoted(data, data_end, (packet->l4 + ICMP_BYTES) & OFFSET_MASK, type, &quoted) ||
	    !same_addr(&quoted.src, &packet->dst) || !is_tunnel_protocol(quoted.proto))
		return 0;
	where = quoted.dst;
	bpf_map_update_elem(&unreachable, &where, &now, BPF_ANY);
	return 0;
}

/* Nothing is answered to groups or to nobody, and no error about an error (RFC
 * 1122, 4443). */
static __always_inline bool may_reply(const struct packet *packet)
{
	__u32 first = bpf_ntohl(packet->family == 4 ? packet->src.w[3] : packet->src.w[0]);

	if (packet->flags & (PACKET_ICMP_ERROR | PACKET_LATER_FRAGMENT))
		return false;
	if (packet->family == 4)
		return first >> 24 != 0 && first >> 24 != 127 && first >> 28 < 14;
	return first >> 24 != 0xff &&
	       (first | packet->src.w[1] | packet->src.w[2] | packet->src.w[3]);
}

/* Answers an echo request to a VIP in its own frame. */
__noinline int reply_echo(struct xdp_md *ctx, const struct packet *packet)
{
	void *data = (void *)(long)ctx->data, *data_end = (void *)(long)ctx->data_end;
	struct icmp *icmp;

	if (!packet || packet->flags & PACKET_FIRST_FRAGMENT || !may_reply(packet))
		return xdp_drop(DROP_PROTOCOL);
	icmp = data + (packet->l4 & OFFSET_MASK);
	if ((void *)(icmp + 1) > data_end || data + sizeof(struct ethhdr) > data_end)
		return xdp_drop(DROP_MALFORMED);
	if (packet->family == 4) {
		struct iphdr *ip = data + (packet->l3 & OFFSET_MASK);
		__u16 *ttl;

		if ((void *)(ip + 1) > data_end)
			return xdp_drop(DROP_MALFORMED);
		ip->saddr = packet->dst.w[3];
		ip->daddr = packet->src.w[3];
		ttl = (__u16 *)&ip->ttl;
		ip->check = move_sum(ip->check, *ttl, bpf_htons(REPLY_TTL << 8 | IPPROTO_ICMP));
		ip->ttl = REPLY_TTL;
		icmp->type = ICMP_ECHO_REPLY;
		icmp->check = move_sum(icmp->check, bpf_htons(ICMP_ECHO << 8), 0);
	} else {
		struct ipv6hdr *ip = data + (packet->l3 & OFFSET_MASK);

		if ((void *)(ip + 1) > data_end)
			return xdp_drop(DROP_MALFORMED);
		__builtin_memcpy(&ip->saddr, &packet->dst, sizeof(ip->saddr));
		__builtin_memcpy(&ip->daddr, &packet->src, sizeof(ip->daddr));
		ip->hop_limit = REPLY_TTL;
		icmp->type = ICMPV6_ECHO_REPLY;
		icmp->check = move_sum(icmp->check, bpf_htons(ICMPV6_ECHO << 8),
				       bpf_htons(ICMPV6_ECHO_REPLY << 8));
	}
	swap_macs(data);
	count_event(EVENT_ECHO_REPLY);
	TRACE(verdict, VERDICT_REPLY);
	return XDP_TX;
}

/* Cuts the packet to what is quoted and makes room for the headers before it. */
static __always_inline bool make_quote(struct xdp_md *ctx, const struct packet *packet, __u32 quote,
				       int headers)
{
	__u32 total = bpf_xdp_get_buff_len(ctx);
	__u8 *to, *from;

	if (bpf_xdp_adjust_tail(ctx, (int)(packet->l3 + quote) - (int)total) ||
	    bpf_xdp_adjust_head(ctx, -headers))
		return false;
	to = (void *)(long)ctx->data;
	from = to + headers;
	if (from + sizeof(struct ethhdr) + VLAN_TAGS_MAX * sizeof(struct vlan_tag) >
	    (__u8 *)(long)ctx->data_end)
		return false;
	for (__u32 i = 0; i < sizeof(struct ethhdr) + VLAN_TAGS_MAX * sizeof(struct vlan_tag);
	     i++) {
		if (i >= packet->l3)
			break;
		to[i] = from[i];
	}
	swap_macs((void *)to);
	return true;
}

static __always_inline __u32 sum_quote(const __u16 *from, __u32 quote, const void *data_end)
{
	__u32 sum = 0;

	for (__u32 i = 0; i < QUOTE_BYTES / 2; i++) {
		if (i * 2 >= quote || (const void *)(from + i + 1) > data_end)
			break;
		sum += from[i];
	}
	return sum;
}

static __always_inline bool write_error4(struct xdp_md *ctx, const struct packet *packet,
					 __u32 quote, bool too_big, __u32 mtu)
{
	struct iphdr *ip = (void *)(long)ctx->data + (packet->l3 & OFFSET_MASK);
	struct icmp *icmp = (void *)(ip + 1);
	void *data_end = (void *)(long)ctx->data_end;

	if ((void *)(icmp + 1) > data_end)
		return false;
	__builtin_memset(ip, 0, sizeof(*ip) + sizeof(*icmp));
	ip->version = 4;
	ip->ihl = 5;
	ip->tot_len = bpf_htons(sizeof(*ip) + sizeof(*icmp) + quote);
	ip->ttl = REPLY_TTL;
	ip->protocol = IPPROTO_ICMP;
	ip->saddr = packet->dst.w[3];
	ip->daddr = packet->src.w[3];
	ip->check = ~fold(add_words((void *)ip, sizeof(*ip) / 2));
	icmp->type = too_big ? ICMP_DEST_UNREACH : ICMP_TIME_EXCEEDED;
	icmp->code = too_big ? ICMP_FRAG_NEEDED : 0;
	icmp->number = bpf_htons(mtu);
	icmp->check = ~fold(add_words((void *)icmp, sizeof(*icmp) / 2) +
			    sum_quote((void *)(icmp + 1), quote, data_end));
	return true;
}

static __always_inline bool write_error6(struct xdp_md *ctx, const struct packet *packet,
					 __u32 quote, bool too_big, __u32 mtu)
{
	struct ipv6hdr *ip = (void *)(long)ctx->data + (packet->l3 & OFFSET_MASK);
	struct icmp *icmp = (void *)(ip + 1);
	void *data_end = (void *)(long)ctx->data_end;
	__u32 sum;

	if ((void *)(icmp + 1) > data_end)
		return false;
	__builtin_memset(ip, 0, sizeof(*ip) + sizeof(*icmp));
	ip->version = 6;
	ip->payload_len = bpf_htons(sizeof(*icmp) + quote);
	ip->nexthdr = IPPROTO_ICMPV6;
	ip->hop_limit = REPLY_TTL;
	__builtin_memcpy(&ip->saddr, &packet->dst, sizeof(ip->saddr));
	__builtin_memcpy(&ip->daddr, &packet->src, sizeof(ip->daddr));
	icmp->type = too_big ? ICMPV6_TOO_BIG : ICMPV6_TIME_EXCEEDED;
	icmp->number = bpf_htons(mtu);
	sum = add_words((void *)&ip->saddr, 2 * sizeof(ip->saddr) / 2) + ip->payload_len +
	      bpf_htons(IPPROTO_ICMPV6) + add_words((void *)icmp, sizeof(*icmp) / 2) +
	      sum_quote((void *)(icmp + 1), quote, data_end);
	icmp->check = ~fold(sum);
	return true;
}

/* Tells the sender why its packet went no further: EVENT_TOO_BIG with the MTU
 * that would do, or EVENT_TIME_EXCEEDED. The source is the VIP. */
__noinline int reply_error(struct xdp_md *ctx, const struct packet *packet, __u32 event, __u32 mtu)
{
	bool too_big = event == EVENT_TOO_BIG, made;
	__u32 refused = too_big ? DROP_TOO_BIG : DROP_TTL, quote;

	if (!packet || !may_reply(packet))
		return xdp_drop(refused);
	quote = packet->length & ~1U;
	if (quote > QUOTE_BYTES)
		quote = QUOTE_BYTES;
	if (packet->family == 4)
		made = make_quote(ctx, packet, quote, sizeof(struct iphdr) + ICMP_BYTES) &&
		       write_error4(ctx, packet, quote, too_big, mtu);
	else
		made = make_quote(ctx, packet, quote, sizeof(struct ipv6hdr) + ICMP_BYTES) &&
		       write_error6(ctx, packet, quote, too_big, mtu);
	if (!made)
		return xdp_drop(refused);
	count_event(event);
	TRACE(verdict, VERDICT_REPLY);
	return XDP_TX;
}
