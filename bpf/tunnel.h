/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Tunnel packets to this node: whether they may be believed, and what is in
 * them. Whatever is not exactly as an LB node of this shard sends it is
 * dropped, each under its own reason.
 */
#pragma once

#include "deliver.h"
#include "encap.h"

#define ECN_MASK 3
#define ECN_ECT1 1
#define ECN_ECT0 2
#define ECN_CE 3

static __always_inline bool to_this_node(const struct packet *packet)
{
	struct addr own = packet->family == 4 ? config.node4 : config.node6;

	return same_addr(&packet->dst, &own) && (own.w[0] | own.w[1] | own.w[2] | own.w[3]);
}

/* A tunnel packet for us, by its addresses, protocol and port. Fragments are
 * none: LB nodes send none. */
static __always_inline bool tunnel_here(void *data, void *data_end, struct packet *packet)
{
	if (packet->proto != IPPROTO_UDP && packet->proto != IPPROTO_IPIP &&
	    packet->proto != IPPROTO_IPV6)
		return false;
	return to_this_node(packet) && !parse_transport(data, data_end, packet, false) &&
	       !packet->flags &&
	       (packet->proto != IPPROTO_UDP || packet->dst_port == config.geneve_port);
}

static __always_inline bool from_lb_node(const struct packet *packet)
{
	struct lb_node_key key = {.prefix_len = 128, .address = packet->src};

	return bpf_map_lookup_elem(&lb_nodes, &key) != NULL;
}

/* Reads and checks Geneve and its option: who is meant, and the flow's hash.
 * Returns the offset of the inner packet, or minus an enum drop. */
static __always_inline int read_option(struct xdp_md *ctx, const struct packet *outer,
				       struct pod_key *target, __u64 *hash, __be16 *type)
{
	void *data_end = (void *)(long)ctx->data_end;
	struct geneve_outer *at = (void *)(long)ctx->data + (outer->l4 & OFFSET_MASK);
	struct tunnel_option *option = &at->geneve.option;
	__u32 address_len, inner;
	__be32 *address;

	if ((void *)(at + 1) + 4 > data_end)
		return -DROP_TUNNEL_FORMAT;
	*type = at->geneve.type;
	address_len = option->address_len;
	if (at->geneve.flags != GENEVE_CRITICAL ||
	    at->geneve.option_class != bpf_htons(OPTION_CLASS) ||
	    at->geneve.option_type != OPTION_TYPE || option->version != OPTION_VERSION ||
	    (address_len != 4 && address_len != 16) ||
	    at->geneve.option_length != (sizeof(*option) + address_len) / 4 ||
	    at->geneve.options != (4 + sizeof(*option) + address_len) / 4 ||
	    (*type != bpf_htons(ETH_P_IP) && *type != bpf_htons(ETH_P_IPV6)))
		return -DROP_TUNNEL_FORMAT;
	if (at->geneve.vni != bpf_htonl(config.vni << 8))
		return -DROP_TUNNEL_VNI;
	if (*(__u64 *)option->tag != *(const volatile __u64 *)config.tag)
		return -DROP_TUNNEL_TAG;
	if (option->verb == VERB_ASK)
		return -DROP_TUNNEL_QUESTION;
	if (option->verb == VERB_DENIED)
		return -DROP_TUNNEL_BOUNCE;
	if (option->verb != VERB_DELIVER)
		return -DROP_TUNNEL_FORMAT;
	address = (void *)(at + 1);
	if (address_len == 4) {
		map_v4(&target->address, *address);
	} else {
		if ((void *)address + 16 > data_end)
			return -DROP_TUNNEL_FORMAT;
		__builtin_memcpy(&target->address, address, 16);
	}
	target->port = option->port;
	*hash = bpf_be64_to_cpu(*(__be64 *)option->hash);
	inner = outer->l4 + sizeof(*at) + address_len;
	return inner > OFFSET_MASK ? -DROP_TUNNEL_FORMAT : (int)inner;
}

/* RFC 6040, the decapsulator: what the tunnel saw is told to the Pod. */
static __always_inline bool carry_ecn(struct xdp_md *ctx, const struct packet *inner,
				      __u8 outer_tos)
{
	void *at = (void *)(long)ctx->data + (inner->l3 & OFFSET_MASK);
	__u8 outer = outer_tos & ECN_MASK, ecn = inner->tos & ECN_MASK, fresh = ecn;

	if (outer == ECN_CE && !ecn)
		return false;
	if (outer == ECN_CE)
		fresh = ECN_CE;
	else if (outer == ECN_ECT1 && ecn == ECN_ECT0)
		fresh = ECN_ECT1;
	if (fresh == ecn)
		return true;
	if (inner->family == 4) {
		struct iphdr *ip = at;

		if ((void *)(ip + 1) > (void *)(long)ctx->data_end)
			return false;
		ip->check =
			move_sum(ip->check, bpf_htons(ip->tos), bpf_htons(ip->tos ^ ecn ^ fresh));
		ip->tos ^= ecn ^ fresh;
	} else {
		__be16 *first = at;

		if ((void *)(first + 1) > (void *)(long)ctx->data_end)
			return false;
		*first ^= bpf_htons((ecn ^ fresh) << 4);
	}
	return true;
}

/* Takes everything before the inner packet off, but for the Ethernet addresses. */
static __always_inline bool strip(struct xdp_md *ctx, struct packet *inner, __be16 type)
{
	struct ethhdr *eth = (void *)(long)ctx->data, old;
	int bytes = (int)inner->l3 - (int)sizeof(*eth);

	if ((void *)(eth + 1) > (void *)(long)ctx->data_end)
		return false;
	old = *eth;
	old.h_proto = type;
	if (bpf_xdp_adjust_head(ctx, bytes))
		return false;
	eth = (void *)(long)ctx->data;
	if ((void *)(eth + 1) > (void *)(long)ctx->data_end)
		return false;
	*eth = old;
	inner->l4 -= bytes;
	inner->quoted -= bytes;
	inner->l3 = sizeof(*eth);
	return true;
}

/* What is in the tunnel must be a whole packet to a VIP, of TCP, UDP or about
 * them. Returns an enum drop; the flow is then in `inner`. */
__noinline int examine(struct xdp_md *ctx, struct packet *inner)
{
	if (!inner)
		return DROP_MALFORMED;
	if (inner->l3 + inner->length > bpf_xdp_get_buff_len(ctx))
		return DROP_MALFORMED;
	if (inner->flags & PACKET_ICMP_ERROR)
		return quoted_flow(ctx, inner);
	if (inner->proto != IPPROTO_TCP && inner->proto != IPPROTO_UDP)
		return DROP_PROTOCOL;
	if (inner->flags & PACKET_LATER_FRAGMENT)
		return recall_fragment(inner);
	if (inner->flags & PACKET_FIRST_FRAGMENT)
		remember_fragment(inner);
	return DROP_NONE;
}

/* A tunnel packet that an LB node sent: delivers what is in it. `packet` is
 * the outer one, and then the inner: there is stack for one. */
static __always_inline int unwrap(struct xdp_md *ctx, struct packet *packet)
{
	bool geneve = packet->proto == IPPROTO_UDP;
	struct pod_key target = {};
	__u8 outer_tos = packet->tos;
	__u64 hash = 0;
	__be16 type;
	int at, drop;

	if (!from_lb_node(packet))
		return xdp_drop(DROP_TUNNEL_SOURCE);
	TRACE(tunnel, geneve ? MODE_GENEVE : MODE_IPIP);
	if (geneve) {
		at = read_option(ctx, packet, &target, &hash, &type);
		if (at < 0)
			return xdp_drop(-at);
	} else {
		at = packet->l4 & OFFSET_MASK;
		type = packet->proto == IPPROTO_IPIP ? bpf_htons(ETH_P_IP) : bpf_htons(ETH_P_IPV6);
	}
	drop = parse((void *)(long)ctx->data, (void *)(long)ctx->data_end, at, type, packet);
	trace_packet(packet);
	if (!drop)
		drop = examine(ctx, packet);
	if (drop)
		return xdp_drop(drop < 0 ? DROP_MALFORMED : drop);
	target.proto = packet->proto;
	if (!geneve) {
		target.address = packet->dst;
		target.port = packet->dst_port;
	}
	if (!carry_ecn(ctx, packet, outer_tos))
		return xdp_drop(DROP_TUNNEL_ECN);
	if (!strip(ctx, packet, type))
		return xdp_drop(DROP_MALFORMED);
	TRACE_STEP(TRACE_DECAPSULATED);
	return deliver(ctx, packet, &target, hash);
}
