// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/*
 * Programs for the router of a throwaway network: they count what passes
 * between it and each node, and tag frames as a switch would. A veth whose
 * peer sends frames from XDP needs an XDP program anyway.
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>
#include <linux/tcp.h>
#include <linux/udp.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

enum sight {
	SIGHT_OTHER = 0,
	SIGHT_REQUEST = 1, /* TCP or UDP to a VIP */
	SIGHT_ANSWER = 2,  /* TCP or UDP from a VIP */
	SIGHT_TUNNEL = 3,  /* IP protocol 4 or 41, or UDP to the tunnel's port */
	SIGHT_ICMP = 4,	   /* ICMP or ICMPv6 from or to a VIP */
};

enum direction {
	FROM_NODE = 0,
	TO_NODE = 1,
};

struct sight_key {
	__u32 ifindex;
	__u32 direction; /* enum direction */
	__u32 sight;	 /* enum sight */
};

struct vip_key {
	__u32 prefix_len; /* of 16 bytes, IPv4 as v4-mapped */
	__u32 address[4];
};

const enum sight *unused_sight __attribute__((unused));
const enum direction *unused_direction __attribute__((unused));

volatile const __u16 tunnel_port = 6082;
volatile const __u16 vlan = 0;

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__type(key, struct sight_key);
	__type(value, __u64);
	__uint(max_entries, 4096);
} sights SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__type(key, struct vip_key);
	__type(value, __u32);
	__uint(max_entries, 64);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} vips SEC(".maps");

struct view {
	struct vip_key src;
	struct vip_key dst;
	__u8 proto;
	void *l4;
};

static __always_inline int see(struct view *v, void *data, void *end, __u16 ethertype)
{
	v->src.prefix_len = v->dst.prefix_len = 128;
	if (ethertype == bpf_htons(ETH_P_IP)) {
		struct iphdr *ip = data;

		if ((void *)(ip + 1) > end)
			return -1;
		v->src.address[2] = v->dst.address[2] = bpf_htonl(0xffff);
		v->src.address[3] = ip->saddr;
		v->dst.address[3] = ip->daddr;
		v->proto = ip->protocol;
		v->l4 = (void *)ip + sizeof(*ip);
		return 0;
	}
	if (ethertype == bpf_htons(ETH_P_IPV6)) {
		struct ipv6hdr *ip = data;

		if ((void *)(ip + 1) > end)
			return -1;
		__builtin_memcpy(v->src.address, &ip->saddr, 16);
		__builtin_memcpy(v->dst.address, &ip->daddr, 16);
		v->proto = ip->nexthdr;
		v->l4 = ip + 1;
		return 0;
	}
	return -1;
}

/* Apart, lest the compiler joins two pointers, which the verifier forbids. */
static __noinline int is_vip(struct vip_key *key)
{
	return bpf_map_lookup_elem(&vips, key) ? 1 : 0;
}

static __always_inline __u32 classify(void *data, void *end, __u16 ethertype)
{
	struct view v = {};
	struct udphdr *udp;
	int from, to;

	if (see(&v, data, end, ethertype))
		return SIGHT_OTHER;
	if (v.proto == IPPROTO_IPIP || v.proto == IPPROTO_IPV6)
		return SIGHT_TUNNEL;
	udp = v.l4;
	if (v.proto == IPPROTO_UDP && (void *)(udp + 1) <= end &&
	    udp->dest == bpf_htons(tunnel_port))
		return SIGHT_TUNNEL;
	from = is_vip(&v.src);
	to = is_vip(&v.dst);
	if ((from || to) && (v.proto == IPPROTO_ICMP || v.proto == IPPROTO_ICMPV6))
		return SIGHT_ICMP;
	if (from)
		return SIGHT_ANSWER;
	return to ? SIGHT_REQUEST : SIGHT_OTHER;
}

static __always_inline void count(__u32 ifindex, __u32 direction, __u32 sight)
{
	struct sight_key key = {.ifindex = ifindex, .direction = direction, .sight = sight};
	__u64 one = 1, *n = bpf_map_lookup_elem(&sights, &key);

	if (n)
		*n += 1;
	else
		bpf_map_update_elem(&sights, &key, &one, BPF_NOEXIST);
}

SEC("xdp.frags")
int from_node(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct ethhdr *eth = data;

	if ((void *)(eth + 1) <= end)
		count(ctx->ingress_ifindex, FROM_NODE, classify(eth + 1, end, eth->h_proto));
	return XDP_PASS;
}

SEC("tc")
int to_node(struct __sk_buff *skb)
{
	void *data, *end;

	bpf_skb_pull_data(skb, 0);
	data = (void *)(long)skb->data + ETH_HLEN;
	end = (void *)(long)skb->data_end;
	count(skb->ifindex, TO_NODE, classify(data, end, skb->protocol));
	if (vlan)
		bpf_skb_vlan_push(skb, bpf_htons(ETH_P_8021Q), vlan);
	return TC_ACT_OK;
}

/* For the node's end, where the kernel has no VLAN devices. */
SEC("tc")
int untag(struct __sk_buff *skb)
{
	if (skb->vlan_present)
		bpf_skb_vlan_pop(skb);
	return TC_ACT_OK;
}

/* For test runs with live frames: each SYN in the template's place is of another
 * address of flood_base's /10 and another port, and leaves by flood_out. */
volatile const __u32 flood_base = 0;
volatile const __u32 flood_out = 0;

static __always_inline __u16 fold(__u32 sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	return sum + (sum >> 16);
}

static __always_inline __u16 move_sum(__u16 check, __u32 from, __u32 to)
{
	return ~fold((__u16)~check + (__u16)~fold(from) + fold(to));
}

SEC("xdp")
int flood(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct iphdr *ip = data + sizeof(struct ethhdr);
	struct tcphdr *tcp = (void *)(ip + 1);
	__u32 random = bpf_get_prandom_u32(), from, to;

	if ((void *)(tcp + 1) > end)
		return XDP_DROP;
	from = (ip->saddr & 0xffff) + (ip->saddr >> 16);
	ip->saddr = bpf_htonl(flood_base | (random & 0x3fffff));
	to = (ip->saddr & 0xffff) + (ip->saddr >> 16);
	ip->check = move_sum(ip->check, from, to);
	from += tcp->source;
	tcp->source = bpf_htons(1024 + (random >> 22));
	tcp->check = move_sum(tcp->check, from, to + tcp->source);
	return bpf_redirect(flood_out, 0);
}

char _license[] SEC("license") = "Dual BSD/GPL";
