/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Headers, from Ethernet to ports, with every bound checked. Nothing is
 * decided here; what is wrong with a packet is returned as an enum drop, and
 * whether that matters is for the caller, since it may not be ours at all.
 */
#pragma once

#include "maps.h"
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>
#include <linux/udp.h>
#include <stdbool.h>

#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)
#define READ_ONCE(x) (*(const volatile typeof(x) *)&(x))

/* Not IPv4 or IPv6, or too short to hold addresses: nobody's concern. */
#define PARSE_NOT_IP (-1)

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10
#define V4_MAPPED bpf_htonl(0xffff)
#define IPV4_DONT_FRAGMENT 0x4000
#define IPV4_MORE_FRAGMENTS 0x2000
#define IPV4_OFFSET 0x1fff
/* Offsets from the start of a frame are kept below this for the verifier. */
#define OFFSET_MASK 0x3ff

/* <linux/icmp.h> wants the C library's headers; this is what we need of it. */
#define ICMP_ECHO_REPLY 0
#define ICMP_DEST_UNREACH 3
#define ICMP_FRAG_NEEDED 4
#define ICMP_ECHO 8
#define ICMP_TIME_EXCEEDED 11
#define ICMP_PARAMETER_PROBLEM 12
#define ICMPV6_DEST_UNREACH 1
#define ICMPV6_TOO_BIG 2
#define ICMPV6_TIME_EXCEEDED 3
#define ICMPV6_PARAMETER_PROBLEM 4
#define ICMPV6_ECHO 128
#define ICMPV6_ECHO_REPLY 129

struct icmp {
	__u8 type;
	__u8 code;
	__sum16 check;
	__be16 id;     /* of an echo */
	__be16 number; /* MTU of Frag Needed */
};

struct vlan_tag {
	__be16 tci;
	__be16 type;
};

struct extension {
	__u8 next;
	__u8 length;
	__be16 offset; /* in a fragment header: offset and flags */
	__be32 id;     /* in a fragment header */
};

/* What the headers say. Offsets count from the start of the frame. */
struct packet {
	struct addr src;
	struct addr dst;
	__be16 src_port; /* 0 unless TCP or UDP, and in later fragments */
	__be16 dst_port;
	__u8 proto;  /* of the transport; in later IPv6 fragments of what is cut up */
	__u8 family; /* 4 or 6 */
	__u8 flags;  /* PACKET_* */
	__u8 tos;    /* TOS or traffic class */
	__u8 ttl;    /* TTL or hop limit */
	__u8 pad;
	__u16 quoted; /* of an ICMP error: offset of the quoted transport header */
	__u32 l3;
	__u32 l4;
	__u32 length; /* of IP header and payload, as the header says */
	__be32 id;    /* of a fragmented datagram */
} __attribute__((aligned(8)));

static __always_inline bool is_v4(const struct addr *a)
{
	return a->w[0] == 0 && a->w[1] == 0 && a->w[2] == V4_MAPPED;
}

static __always_inline bool same_addr(const struct addr *a, const struct addr *b)
{
	return a->w[3] == b->w[3] && a->w[2] == b->w[2] && a->w[1] == b->w[1] && a->w[0] == b->w[0];
}

/*
 * Addresses on the stack are written and read as two words: a load that spans
 * several smaller stores would wait until all of them have left the core.
 */
static __always_inline void map_v4(struct addr *a, __be32 v4)
{
	__u64 *to = (void *)a;

	to[0] = 0;
	to[1] = (__u64)v4 << 32 | V4_MAPPED;
}

/* Ethernet and up to two VLAN tags: finds the L3 header and its type. */
static __always_inline int parse_link(void *data, void *data_end, __u32 *l3, __be16 *ethertype)
{
	struct ethhdr *eth = data;
	struct vlan_tag *tag = (void *)(eth + 1);

	if ((void *)(eth + 1) > data_end)
		return PARSE_NOT_IP;
	*l3 = sizeof(*eth);
	*ethertype = eth->h_proto;
	for (int i = 0; i < VLAN_TAGS_MAX; i++, tag++) {
		if (likely(*ethertype != bpf_htons(ETH_P_8021Q) &&
			   *ethertype != bpf_htons(ETH_P_8021AD)))
			break;
		if ((void *)(tag + 1) > data_end)
			return PARSE_NOT_IP;
		*l3 += sizeof(*tag);
		*ethertype = tag->type;
	}
	return 0;
}

/* The fixed part of the L3 header, at offset l3. */
static __always_inline int parse_addresses(void *data, void *data_end, __u32 l3, __be16 ethertype,
					   struct packet *packet)
{
	packet->src_port = 0;
	packet->dst_port = 0;
	packet->flags = 0;
	packet->l3 = l3;
	packet->id = 0;
	if (ethertype == bpf_htons(ETH_P_IP)) {
		struct iphdr *ip = data + l3;

		if ((void *)(ip + 1) > data_end || ip->version != 4)
			return PARSE_NOT_IP;
		packet->family = 4;
		map_v4(&packet->src, ip->saddr);
		map_v4(&packet->dst, ip->daddr);
		packet->proto = ip->protocol;
		packet->tos = ip->tos;
		packet->ttl = ip->ttl;
		packet->length = bpf_ntohs(ip->tot_len);
		packet->l4 = l3 + ip->ihl * 4;
		return 0;
	}
	if (ethertype == bpf_htons(ETH_P_IPV6)) {
		struct ipv6hdr *ip = data + l3;

		if ((void *)(ip + 1) > data_end || ip->version != 6)
			return PARSE_NOT_IP;
		packet->family = 6;
		__builtin_memcpy(&packet->src, &ip->saddr, sizeof(packet->src));
		__builtin_memcpy(&packet->dst, &ip->daddr, sizeof(packet->dst));
		packet->proto = ip->nexthdr;
		packet->tos = bpf_ntohs(*(__be16 *)ip) >> 4;
		packet->ttl = ip->hop_limit;
		packet->length = bpf_ntohs(ip->payload_len) + sizeof(*ip);
		packet->l4 = l3 + sizeof(*ip);
		return 0;
	}
	return PARSE_NOT_IP;
}

/* A fragment header; one that cuts nothing up is a plain extension (RFC 6946). */
static __always_inline void parse_fragment(const struct extension *ext, struct packet *packet)
{
	__u16 offset = bpf_ntohs(ext->offset);

	packet->id = ext->id;
	if (offset & ~7)
		packet->flags |= PACKET_LATER_FRAGMENT;
	else if (offset & 1)
		packet->flags |= PACKET_FIRST_FRAGMENT;
}

/* IPv6 extension headers, as many as we walk; moves proto and l4 on. */
static __noinline int parse_extensions(void *data, void *data_end, struct packet *packet)
{
	for (int i = 0; i <= EXTENSION_HEADERS_MAX; i++) {
		struct extension *ext = data + (packet->l4 & OFFSET_MASK);
		__u8 proto = packet->proto;
		__u32 bytes = sizeof(*ext);

		if (proto != IPPROTO_HOPOPTS && proto != IPPROTO_ROUTING &&
		    proto != IPPROTO_DSTOPTS && proto != IPPROTO_FRAGMENT)
			return 0;
		if (i == EXTENSION_HEADERS_MAX || packet->l4 > OFFSET_MASK)
			break;
		if ((void *)(ext + 1) > data_end)
			return DROP_MALFORMED;
		/* Segments left: the packet is not for this address yet. */
		if (proto == IPPROTO_ROUTING && ((__u8 *)ext)[3])
			break;
		if (proto == IPPROTO_FRAGMENT)
			parse_fragment(ext, packet);
		else
			bytes += ext->length * 8;
		packet->proto = ext->next;
		packet->l4 += bytes;
		if (packet->flags & PACKET_LATER_FRAGMENT)
			return 0;
	}
	return DROP_EXTENSION_HEADERS;
}

static __always_inline void parse_icmp(__u8 type, struct packet *packet)
{
	if (packet->proto == IPPROTO_ICMP && packet->family == 4) {
		if (type == ICMP_ECHO)
			packet->flags |= PACKET_ECHO;
		if (type == ICMP_DEST_UNREACH || type == ICMP_TIME_EXCEEDED ||
		    type == ICMP_PARAMETER_PROBLEM)
			packet->flags |= PACKET_ICMP_ERROR;
	}
	if (packet->proto == IPPROTO_ICMPV6 && packet->family == 6) {
		if (type == ICMPV6_ECHO)
			packet->flags |= PACKET_ECHO;
		if (type >= ICMPV6_DEST_UNREACH && type <= ICMPV6_PARAMETER_PROBLEM)
			packet->flags |= PACKET_ICMP_ERROR;
	}
}

/*
 * What follows the addresses: fragments, extension headers, ports. A packet
 * quoted in an ICMP error need only have the first 8 bytes of its transport.
 */
static __always_inline int parse_transport(void *data, void *data_end, struct packet *packet,
					   bool quoted)
{
	__u32 need = sizeof(struct udphdr);
	void *l4;

	if (packet->family == 4) {
		struct iphdr *ip = data + (packet->l3 & OFFSET_MASK);

		if ((void *)(ip + 1) > data_end || ip->ihl < 5)
			return DROP_MALFORMED;
		if (unlikely(ip->frag_off & bpf_htons(IPV4_OFFSET | IPV4_MORE_FRAGMENTS))) {
			packet->id = ip->id;
			packet->flags |= ip->frag_off & bpf_htons(IPV4_OFFSET)
						 ? PACKET_LATER_FRAGMENT
						 : PACKET_FIRST_FRAGMENT;
		}
	} else if (unlikely(packet->proto != IPPROTO_TCP && packet->proto != IPPROTO_UDP)) {
		int drop = parse_extensions(data, data_end, packet);

		if (drop)
			return drop;
	}
	if (packet->flags & PACKET_LATER_FRAGMENT)
		return packet->l4 - packet->l3 > packet->length ? DROP_MALFORMED : 0;

	l4 = data + (packet->l4 & OFFSET_MASK);
	if (packet->proto == IPPROTO_TCP && !quoted)
		need = sizeof(struct tcphdr);
	else if (packet->proto != IPPROTO_TCP && packet->proto != IPPROTO_UDP &&
		 packet->proto != IPPROTO_ICMP && packet->proto != IPPROTO_ICMPV6)
		return 0;
	if (packet->l4 > OFFSET_MASK || packet->l4 - packet->l3 + need > packet->length ||
	    l4 + sizeof(struct udphdr) > data_end)
		return DROP_MALFORMED;
	if (packet->proto == IPPROTO_ICMP || packet->proto == IPPROTO_ICMPV6) {
		parse_icmp(*(__u8 *)l4, packet);
		return 0;
	}
	packet->src_port = *(__be16 *)l4;
	packet->dst_port = *(__be16 *)(l4 + 2);
	if (packet->proto == IPPROTO_TCP && !quoted) {
		__u8 *flags = l4 + 13;

		if (l4 + sizeof(struct tcphdr) > data_end)
			return DROP_MALFORMED;
		if ((*flags & (TCP_SYN | TCP_ACK)) == TCP_SYN)
			packet->flags |= PACKET_SYN;
	}
	return 0;
}

/*
 * All of it, for a header at offset l3 of given type. Returns 0; or
 * PARSE_NOT_IP, and packet holds nothing; or an enum drop, and packet holds
 * at least the addresses. Whether `length` is really there is not checked.
 */
static __always_inline int parse(void *data, void *data_end, __u32 l3, __be16 ethertype,
				 struct packet *packet)
{
	int err = parse_addresses(data, data_end, l3, ethertype, packet);

	return err ? err : parse_transport(data, data_end, packet, false);
}

static __always_inline int parse_quoted(void *data, void *data_end, __u32 l3, __be16 ethertype,
					struct packet *packet)
{
	int err = parse_addresses(data, data_end, l3, ethertype, packet);

	return err ? err : parse_transport(data, data_end, packet, true);
}

static __always_inline bool is_tunnel_protocol(__u8 proto)
{
	return proto == IPPROTO_UDP || proto == IPPROTO_IPIP || proto == IPPROTO_IPV6;
}

/* What our tunnels look like from outside, whoever sent it. */
static __always_inline bool is_tunnel(const struct packet *packet)
{
	if (packet->proto == IPPROTO_UDP)
		return packet->dst_port == config.geneve_port;
	return packet->proto == IPPROTO_IPIP || packet->proto == IPPROTO_IPV6;
}
