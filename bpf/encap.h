/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Outer headers, and the frame's way out. RFC 2003 (IPv4-in-IPv4), RFC 2473
 * (in IPv6), RFC 8926 (Geneve), RFC 6040 (ECN, normal mode: the field is
 * copied), RFC 6935 (no UDP checksum over IPv6 in tunnels).
 */
#pragma once

#include "icmp.h"
#include "select.h"

#define OUTER_TTL 64
#define GENEVE_CRITICAL 0x40
#define UDP_PORT_BASE 0xc000
#define UDP_PORT_BITS 0x3fff
#define FLOW_LABEL_BITS 0xfffff

struct geneve {
	__u8 options; /* version 0, and the options' length in 4 bytes */
	__u8 flags;
	__be16 type; /* of the payload, as an EtherType */
	__be32 vni;  /* in the upper 24 bits */
	__be16 option_class;
	__u8 option_type;
	__u8 option_length; /* of its data in 4 bytes */
	struct tunnel_option option;
};

#define OUTER4_BYTES (sizeof(struct ethhdr) + sizeof(struct iphdr))
#define OUTER6_BYTES (sizeof(struct ethhdr) + sizeof(struct ipv6hdr))

struct geneve_outer {
	struct udphdr udp;
	struct geneve geneve;
};

/* Word by word: a plain copy would drop `volatile`, and copy the zeros that the
 * compiler sees in place of what is set at load. */
static __always_inline void copy_constant(void *to, const volatile struct addr *from)
{
	for (int i = 0; i < 4; i++)
		((__be32 *)to)[i] = from->w[i];
}

/* One hop less, before the packet is wrapped. */
static __always_inline bool take_hop(struct xdp_md *ctx, const struct packet *packet)
{
	void *l3 = (void *)(long)ctx->data + (packet->l3 & OFFSET_MASK),
	     *data_end = (void *)(long)ctx->data_end;

	if (packet->family == 4) {
		struct iphdr *ip = l3;
		__u32 sum;

		if ((void *)(ip + 1) > data_end)
			return false;
		ip->ttl--;
		sum = ip->check + bpf_htons(0x0100);
		ip->check = sum + (sum >> 16);
	} else {
		struct ipv6hdr *ip = l3;

		if ((void *)(ip + 1) > data_end)
			return false;
		ip->hop_limit--;
	}
	return true;
}

static __always_inline void outer_eth(struct ethhdr *eth, const struct next_hop *hop, __be16 type)
{
	/* Both addresses in three words: the compiler would copy them by bytes. */
	const __u32 *from = (const void *)hop->dst_mac;
	__u32 *to = (void *)eth;

	to[0] = from[0];
	to[1] = from[1];
	to[2] = from[2];
	*(__be16 *)&to[3] = type;
}

static __always_inline void outer_ip4(struct iphdr *ip, const struct packet *packet,
				      const struct backend *backend, __u8 proto, __be32 src,
				      __u32 extra)
{
	__be16 length = bpf_htons(packet->length + sizeof(*ip) + extra);
	__u32 sum =
		backend->outer_sum + bpf_htons(packet->tos) + length + (src & 0xffff) + (src >> 16);

	ip->version = 4;
	ip->ihl = 5;
	ip->tos = packet->tos;
	ip->tot_len = length;
	ip->id = 0;
	ip->frag_off = bpf_htons(IPV4_DONT_FRAGMENT);
	ip->ttl = OUTER_TTL;
	ip->protocol = proto;
	ip->saddr = src;
	ip->daddr = backend->tunnel.w[3];
	sum = (sum & 0xffff) + (sum >> 16);
	ip->check = ~(sum + (sum >> 16));
}

static __always_inline void outer_ip6(struct ipv6hdr *ip, const struct packet *packet,
				      const struct backend *backend, __u8 proto, __u64 hash,
				      __u32 extra)
{
	*(__be32 *)ip = bpf_htonl(6U << 28 | (__u32)packet->tos << 20 | (hash & FLOW_LABEL_BITS));
	ip->payload_len = bpf_htons(packet->length + extra);
	ip->nexthdr = proto;
	ip->hop_limit = OUTER_TTL;
	__builtin_memcpy(&ip->daddr, &backend->tunnel, sizeof(ip->daddr));
}

static __always_inline void outer_geneve(struct geneve_outer *to, const struct packet *packet,
					 const struct choice *choice, __u32 address_len,
					 __be16 port)
{
	struct geneve *geneve = &to->geneve;

	to->udp.source = bpf_htons(UDP_PORT_BASE | (choice->hash & UDP_PORT_BITS));
	to->udp.dest = config.geneve_port;
	to->udp.len = bpf_htons(packet->length + sizeof(*to) + address_len);
	to->udp.check = 0;
	geneve->options = (4 + sizeof(geneve->option) + address_len) / 4;
	geneve->flags = GENEVE_CRITICAL;
	geneve->type = packet->family == 4 ? bpf_htons(ETH_P_IP) : bpf_htons(ETH_P_IPV6);
	geneve->vni = bpf_htonl(config.vni << 8);
	geneve->option_class = bpf_htons(OPTION_CLASS);
	geneve->option_type = OPTION_TYPE;
	geneve->option_length = (sizeof(geneve->option) + address_len) / 4;
	geneve->option.version = OPTION_VERSION;
	geneve->option.verb = choice->verb;
	geneve->option.attempt = choice->attempt;
	geneve->option.address_len = address_len;
	geneve->option.port = port;
	geneve->option.pad = 0;
	geneve->option.backend = bpf_htonl(choice->number);
	geneve->option.generation =
		bpf_htonl((choice->word >> BACKEND_GENERATION_SHIFT) & BACKEND_GENERATION_MASK);
	__builtin_memcpy(geneve->option.tag, &choice->backend->tag, sizeof(geneve->option.tag));
	*(__be64 *)geneve->option.hash = bpf_cpu_to_be64(choice->hash);
	if (address_len == 4)
		__builtin_memcpy(to + 1, &choice->backend->address.w[3], 4);
	else
		__builtin_memcpy(to + 1, &choice->backend->address, 16);
}

/* Room for `bytes` of headers in front of the L3 header. */
static __always_inline bool make_room(struct xdp_md *ctx, const struct packet *packet, __u32 bytes)
{
	return !bpf_xdp_adjust_head(ctx, (int)packet->l3 - (int)bytes);
}

static __always_inline int wrap_ipip(struct xdp_md *ctx, const struct packet *packet,
				     const struct choice *choice, const struct next_hop *hop,
				     bool v4)
{
	__u8 proto = packet->family == 4 ? IPPROTO_IPIP : IPPROTO_IPV6;
	void *data;

	if (!make_room(ctx, packet, v4 ? OUTER4_BYTES : OUTER6_BYTES))
		return DROP_HEADROOM;
	data = (void *)(long)ctx->data;
	if (v4) {
		struct iphdr *ip = data + sizeof(struct ethhdr);
		__be32 src = config.ipip4.w[3] | ((__u32)choice->hash & config.ipip4_mask.w[3]);

		if ((void *)(ip + 1) > (void *)(long)ctx->data_end)
			return DROP_HEADROOM;
		outer_eth(data, hop, bpf_htons(ETH_P_IP));
		outer_ip4(ip, packet, choice->backend, proto, src, 0);
	} else {
		struct ipv6hdr *ip = data + sizeof(struct ethhdr);
		__be32 *src = ip->saddr.s6_addr32;

		if ((void *)(ip + 1) > (void *)(long)ctx->data_end)
			return DROP_HEADROOM;
		outer_eth(data, hop, bpf_htons(ETH_P_IPV6));
		outer_ip6(ip, packet, choice->backend, proto, choice->hash, 0);
		src[0] = config.ipip6.w[0] | ((__u32)(choice->hash >> 32) & config.ipip6_mask.w[0]);
		src[1] = config.ipip6.w[1] | ((__u32)choice->hash & config.ipip6_mask.w[1]);
		src[2] = config.ipip6.w[2] | ((__u32)(choice->hash >> 32) & config.ipip6_mask.w[2]);
		src[3] = config.ipip6.w[3] | ((__u32)choice->hash & config.ipip6_mask.w[3]);
	}
	return 0;
}

static __always_inline int wrap_geneve(struct xdp_md *ctx, const struct packet *packet,
				       const struct choice *choice, const struct next_hop *hop,
				       bool v4, __u32 address_len)
{
	__u32 extra = sizeof(struct geneve_outer) + address_len;
	void *data;

	if (!make_room(ctx, packet, (v4 ? OUTER4_BYTES : OUTER6_BYTES) + extra))
		return DROP_HEADROOM;
	data = (void *)(long)ctx->data;
	if (v4) {
		struct iphdr *ip = data + sizeof(struct ethhdr);

		if ((void *)(ip + 1) + extra > (void *)(long)ctx->data_end)
			return DROP_HEADROOM;
		outer_eth(data, hop, bpf_htons(ETH_P_IP));
		outer_ip4(ip, packet, choice->backend, IPPROTO_UDP, config.node4.w[3], extra);
		outer_geneve((void *)(ip + 1), packet, choice, address_len, choice->backend->port);
	} else {
		struct ipv6hdr *ip = data + sizeof(struct ethhdr);

		if ((void *)(ip + 1) + extra > (void *)(long)ctx->data_end)
			return DROP_HEADROOM;
		outer_eth(data, hop, bpf_htons(ETH_P_IPV6));
		outer_ip6(ip, packet, choice->backend, IPPROTO_UDP, choice->hash, extra);
		copy_constant(&ip->saddr, &config.node6);
		outer_geneve((void *)(ip + 1), packet, choice, address_len, choice->backend->port);
	}
	return 0;
}

/* Whether the outer header is IPv4: only that one has a sum. */
static __always_inline bool outer_v4(const struct backend *backend)
{
	return backend->outer_sum;
}

/* Bytes that the tunnel adds to the L3 packet. */
static __always_inline __u32 overhead(const struct packet *packet, const struct backend *backend)
{
	__u32 bytes = outer_v4(backend) ? sizeof(struct iphdr) : sizeof(struct ipv6hdr);

	if (unlikely(backend->mode >= MODE_L2))
		return 0;
	if (backend->mode == MODE_GENEVE)
		bytes += sizeof(struct geneve_outer) + (packet->family == 4 ? 4 : 16);
	return bytes;
}

/* The packet as it is, in a frame to the server, which holds the VIP. */
static __always_inline int reframe(struct xdp_md *ctx, const struct packet *packet,
				   const struct next_hop *hop)
{
	void *data;

	if (!make_room(ctx, packet, sizeof(struct ethhdr)))
		return DROP_HEADROOM;
	data = (void *)(long)ctx->data;
	if (data + sizeof(struct ethhdr) > (void *)(long)ctx->data_end)
		return DROP_HEADROOM;
	outer_eth(data, hop, packet->family == 4 ? bpf_htons(ETH_P_IP) : bpf_htons(ETH_P_IPV6));
	return 0;
}

static __always_inline int wrap(struct xdp_md *ctx, const struct packet *packet,
				const struct choice *choice, const struct next_hop *hop)
{
	bool v4 = outer_v4(choice->backend);

	if (choice->backend->mode == MODE_IPIP)
		return wrap_ipip(ctx, packet, choice, hop, v4);
	if (unlikely(choice->backend->mode == MODE_L2))
		return reframe(ctx, packet, hop);
	if (packet->family == 4)
		return wrap_geneve(ctx, packet, choice, hop, v4, 4);
	return wrap_geneve(ctx, packet, choice, hop, v4, 16);
}

/* A tag between the Ethernet addresses and the type. */
__noinline int push_vlan(struct xdp_md *ctx, __be16 tci)
{
	struct {
		__u8 macs[2 * ETH_ALEN];
		__be16 tpid;
		__be16 tci;
	} *to, *from;

	if (bpf_xdp_adjust_head(ctx, -(int)sizeof(struct vlan_tag)))
		return DROP_HEADROOM;
	to = (void *)(long)ctx->data;
	from = (void *)to + sizeof(struct vlan_tag);
	if ((void *)(from + 1) > (void *)(long)ctx->data_end)
		return DROP_HEADROOM;
	__builtin_memmove(to->macs, from->macs, sizeof(to->macs));
	to->tpid = bpf_htons(ETH_P_8021Q);
	to->tci = tci;
	return 0;
}

/* The kernel's own answer, while user space has not resolved the next hop. */
__noinline int ask_fib(struct xdp_md *ctx, const struct backend *backend, __u32 length,
		       struct next_hop *hop)
{
	struct bpf_fib_lookup fib = {.ifindex = ctx->ingress_ifindex, .tot_len = length};

	/* To a gateway, a packet that is not wrapped would come back. */
	if (!backend || !hop || backend->mode == MODE_L2)
		return DROP_NO_NEXT_HOP;
	if (is_v4(&backend->tunnel)) {
		fib.family = 2; /* AF_INET */
		fib.ipv4_src = config.node4.w[3];
		fib.ipv4_dst = backend->tunnel.w[3];
	} else {
		fib.family = 10; /* AF_INET6 */
		copy_constant(fib.ipv6_src, &config.node6);
		__builtin_memcpy(fib.ipv6_dst, &backend->tunnel, sizeof(fib.ipv6_dst));
	}
	switch (bpf_fib_lookup(ctx, &fib, sizeof(fib), 0)) {
	case BPF_FIB_LKUP_RET_SUCCESS:
		hop->mtu = 65535;
		break;
	case BPF_FIB_LKUP_RET_FRAG_NEEDED:
		hop->mtu = fib.mtu_result;
		break;
	default:
		return DROP_NO_NEXT_HOP;
	}
	hop->ifindex = fib.ifindex;
	hop->vlan = 0;
	__builtin_memcpy(hop->dst_mac, fib.dmac, ETH_ALEN);
	__builtin_memcpy(hop->src_mac, fib.smac, ETH_ALEN);
	count_event(EVENT_FIB_LOOKUP);
	return 0;
}

static __always_inline int transmit(struct xdp_md *ctx, const struct next_hop *hop)
{
	TRACING(to->verdict = VERDICT_FORWARD; to->ifindex = hop->ifindex);
	if (hop->ifindex == ctx->ingress_ifindex)
		return XDP_TX;
	return bpf_redirect(hop->ifindex, 0);
}

static __always_inline void count_choice(const struct packet *packet, const struct choice *choice)
{
	bool syn = packet->flags & PACKET_SYN;

	count_packet(&service_counters, choice->service, packet->length, syn);
	count_packet(&backend_counters, choice->number, packet->length, syn);
}

#define WAY_FOUND (-1)

/* The way to the chosen backend, in *hop; `asked` has room for what the kernel
 * says. Returns WAY_FOUND, or an XDP action for a packet that cannot take it. */
static __always_inline int find_way(struct xdp_md *ctx, struct packet *packet,
				    const struct choice *choice, struct next_hop *asked,
				    struct next_hop **hop)
{
	__u32 row = (__u32)choice->word;
	__u32 length = packet->length + overhead(packet, choice->backend);
	int drop;

	*hop = bpf_map_lookup_elem(&next_hops, &row);
	if (unlikely(packet->ttl <= 1 && !(packet->flags & PACKET_BOUNCED)))
		return reply_error(ctx, packet, EVENT_TIME_EXCEEDED, 0);
	if (unlikely(!row || !*hop)) {
		__builtin_memset(asked, 0, sizeof(*asked));
		drop = ask_fib(ctx, choice->backend, length, asked);
		if (drop)
			return xdp_drop(drop);
		*hop = asked;
	}
	TRACING(to->next_hop = row; to->steps |= TRACE_NEXT_HOP);
	if (unlikely(length > (*hop)->mtu))
		return reply_error(ctx, packet, EVENT_TOO_BIG,
				   (*hop)->mtu - (length - packet->length));
	return WAY_FOUND;
}

/* The frame is made: it gets its tag, if any, and leaves. */
static __always_inline int leave(struct xdp_md *ctx, const struct next_hop *hop)
{
	if (unlikely(hop->vlan)) {
		int drop = push_vlan(ctx, hop->vlan);

		if (drop)
			return xdp_drop(drop);
	}
	return transmit(ctx, hop);
}

/* Sends the packet to the chosen backend's node. Returns an XDP action. */
static __always_inline int forward(struct xdp_md *ctx, struct packet *packet,
				   const struct choice *choice)
{
	struct next_hop asked, *hop;
	int action = find_way(ctx, packet, choice, &asked, &hop);

	if (unlikely(action != WAY_FOUND))
		return action;
	/* The first attempt took it. */
	if (likely(!(packet->flags & PACKET_BOUNCED)) && unlikely(!take_hop(ctx, packet)))
		return xdp_drop(DROP_MALFORMED);
	action = wrap(ctx, packet, choice, hop);
	if (unlikely(action))
		return xdp_drop(action);
	count_choice(packet, choice);
	return leave(ctx, hop);
}
