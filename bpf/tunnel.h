/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Tunnel packets to this node: whether they may be believed, and what is in
 * them. Whatever is not exactly as an LB node of this shard sends it is
 * dropped, each under its own reason.
 */
#pragma once

#include "bounce.h"

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
	if (packet->proto != IPPROTO_UDP &&
	    (!config.backend || (packet->proto != IPPROTO_IPIP && packet->proto != IPPROTO_IPV6)))
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

/* What a tunnel packet says beside the packet in it. */
struct call {
	struct pod_key target;
	__u64 hash;
	__u64 tag;
	__u32 backend;
	__u32 generation;
	__be16 type; /* of what is in it */
	__u8 verb;
	__u8 attempt;
};

/* Reads Geneve and its option, and checks their form. Returns the offset of the
 * inner packet, or minus an enum drop. */
static __always_inline int read_option(struct xdp_md *ctx, const struct packet *outer,
				       struct call *call)
{
	void *data_end = (void *)(long)ctx->data_end;
	struct geneve_outer *at = (void *)(long)ctx->data + (outer->l4 & OFFSET_MASK);
	struct tunnel_option *option = &at->geneve.option;
	__u32 address_len, inner;
	__be32 *address;
	__be16 type;

	if ((void *)(at + 1) + 4 > data_end)
		return -DROP_TUNNEL_FORMAT;
	type = at->geneve.type;
	address_len = option->address_len;
	if (at->geneve.flags != GENEVE_CRITICAL ||
	    at->geneve.option_class != bpf_htons(OPTION_CLASS) ||
	    at->geneve.option_type != OPTION_TYPE || option->version != OPTION_VERSION ||
	    (address_len != 4 && address_len != 16) ||
	    at->geneve.option_length != (sizeof(*option) + address_len) / 4 ||
	    at->geneve.options != (4 + sizeof(*option) + address_len) / 4 ||
	    (type != bpf_htons(ETH_P_IP) && type != bpf_htons(ETH_P_IPV6)) ||
	    option->verb < VERB_DELIVER || option->verb > VERB_DENIED)
		return -DROP_TUNNEL_FORMAT;
	if (at->geneve.vni != bpf_htonl(config.vni << 8))
		return -DROP_TUNNEL_VNI;
	address = (void *)(at + 1);
	if (address_len == 4) {
		map_v4(&call->target.address, *address);
	} else {
		if ((void *)address + 16 > data_end)
			return -DROP_TUNNEL_FORMAT;
		__builtin_memcpy(&call->target.address, address, 16);
	}
	call->target.port = option->port;
	call->type = type;
	call->verb = option->verb;
	call->attempt = option->attempt;
	call->backend = bpf_ntohl(option->backend);
	call->generation = bpf_ntohl(option->generation);
	call->tag = *(__u64 *)option->tag;
	call->hash = bpf_be64_to_cpu(*(__be64 *)option->hash);
	inner = outer->l4 + sizeof(*at) + address_len;
	return inner > OFFSET_MASK ? -DROP_TUNNEL_FORMAT : (int)inner;
}

/* RFC 6040, the decapsulator: congestion cannot be told to who does not expect
 * to be told. */
static __always_inline bool may_carry_ecn(const struct packet *inner, __u8 outer_tos)
{
	return (outer_tos & ECN_MASK) != ECN_CE || inner->tos & ECN_MASK;
}

/* What the tunnel saw is told to the Pod. */
static __always_inline bool carry_ecn(struct xdp_md *ctx, const struct packet *inner,
				      __u8 outer_tos)
{
	void *at = (void *)(long)ctx->data + (inner->l3 & OFFSET_MASK);
	__u8 outer = outer_tos & ECN_MASK, ecn = inner->tos & ECN_MASK, fresh = ecn;

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

/* Parses and examines what is in a tunnel, in place of the outer packet.
 * Returns an enum drop. */
__noinline int inner_packet(struct xdp_md *ctx, struct packet *packet, __u32 at, __u32 type)
{
	int drop;

	if (!packet)
		return DROP_MALFORMED;
	drop = parse((void *)(long)ctx->data, (void *)(long)ctx->data_end, at & OFFSET_MASK, type,
		     packet);
	trace_packet(packet);
	if (!drop)
		drop = examine(ctx, packet);
	return drop < 0 ? DROP_MALFORMED : drop;
}

/* A question, or an order, that came back to this LB node. */
static __always_inline int bounce(struct xdp_md *ctx, struct packet *packet, int at,
				  const struct call *call)
{
	__u32 service;
	int drop;

	if (!from_backend(packet, call->backend, call->generation, call->tag))
		return xdp_drop(DROP_TUNNEL_BOUNCE);
	drop = inner_packet(ctx, packet, at, call->type);
	if (drop)
		return xdp_drop(drop);
	service = bounced_service(packet, call->hash, call->backend);
	if (!service)
		return xdp_drop(DROP_TUNNEL_BOUNCE);
	if (!strip(ctx, packet, call->type))
		return xdp_drop(DROP_MALFORMED);
	packet->flags |= PACKET_BOUNCED;
	return deliver_to(ctx, packet,
			  denied(ctx, packet, service, call->hash,
				 denial(call->attempt, call->backend,
					config.backend && owned_here(ctx, packet))),
			  call->hash);
}

/* A tunnel packet to this node: delivers what is in it, or sends it back.
 * `packet` is the outer one, and then the inner: there is stack for one. */
static __always_inline int unwrap(struct xdp_md *ctx, struct packet *packet)
{
	bool geneve = packet->proto == IPPROTO_UDP, known = from_lb_node(packet);
	struct call call = {.verb = VERB_DELIVER};
	__u8 outer_tos = packet->tos;
	int at, drop;

	if (geneve) {
		at = read_option(ctx, packet, &call);
		if (at < 0)
			return xdp_drop(known ? -at : DROP_TUNNEL_SOURCE);
		if (config.lb && call.verb == VERB_DENIED)
			return bounce(ctx, packet, at, &call);
	} else {
		at = packet->l4 & OFFSET_MASK;
		call.type =
			packet->proto == IPPROTO_IPIP ? bpf_htons(ETH_P_IP) : bpf_htons(ETH_P_IPV6);
	}
	if (!known || !config.backend)
		return xdp_drop(DROP_TUNNEL_SOURCE);
	TRACE(tunnel, geneve ? MODE_GENEVE : MODE_IPIP);
	if (geneve && call.tag != *(const volatile __u64 *)config.tag)
		return xdp_drop(DROP_TUNNEL_TAG);
	if (call.verb == VERB_DENIED)
		return xdp_drop(DROP_TUNNEL_BOUNCE);
	drop = inner_packet(ctx, packet, at, call.type);
	if (drop)
		return xdp_drop(drop);
	call.target.proto = packet->proto;
	if (!geneve) {
		call.target.address = packet->dst;
		call.target.port = packet->dst_port;
	}
	if (!may_carry_ecn(packet, outer_tos))
		return xdp_drop(DROP_TUNNEL_ECN);
	if (call.verb == VERB_DELIVER && call.attempt == ATTEMPT_PROBE) {
		call.verb = CLAIM_PROBE;
		call.hash = 0;
	}
	drop = claim(ctx, packet, &call.target, call.hash, call.verb);
	if (drop == CLAIM_COOKIE)
		return strip(ctx, packet, call.type) ? send_cookie(ctx, packet, &call.target)
						     : xdp_drop(DROP_MALFORMED);
	if (drop == CLAIM_DENIED)
		return geneve ? deny(ctx) : xdp_drop(DROP_TUNNEL_POD);
	if (drop)
		return xdp_drop(drop);
	if (!carry_ecn(ctx, packet, outer_tos) || !strip(ctx, packet, call.type))
		return xdp_drop(DROP_MALFORMED);
	TRACE_STEP(TRACE_DECAPSULATED);
	return deliver(ctx, packet, &call.target);
}
