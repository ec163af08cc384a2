// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/*
 * What the packet benchmarks need beside the program under test. The same
 * packet again and again would measure nothing, so `generate` restores the
 * frame, varies the client, and tail-calls what is measured. Its own cost is
 * that of tail-calling `nothing`. `prototype` is the baseline: the least that
 * a stateless IPv4-in-IPv4 balancer can do, on the same maps.
 */
#include "fairlead.h"
#include "maps.h"
#include "parse.h"
#include "hash.h"

#define FRAME_MAX 192

struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__type(key, __u32);
	__type(value, __u32);
	__uint(max_entries, 1);
} target SEC(".maps");

volatile const __u8 frame[FRAME_MAX];
volatile const __u32 frame_length;  /* a multiple of 8 */
volatile const __u32 client_offset; /* of the last 4 bytes of the client's address */
volatile const __u32 port_offset;
volatile const __u32 flow_count;
volatile const __u32 hash_offset; /* of the flow's hash in a tunnel option; 0: none */
volatile const __u32 partial_sum; /* of IPv4's header without client and sum; 0: IPv6 */

__u32 turn;

/* The frame of the next turn. Neighbouring turns are spread over the flows, so
 * that no cache is warm by order. */
static __always_inline bool make_frame(void *data, void *data_end)
{
	__u32 flow = (turn++ * 2654435761U) % flow_count, sum;
	__be32 client = bpf_htonl(0xac100000 + (flow >> 12));
	__be16 port = bpf_htons(1024 + (flow & 0xfff));
	__u64 *to = data;

	if (data + frame_length > data_end)
		return false;
	for (__u32 i = 0; i < frame_length / 8; i++)
		to[i] = ((const volatile __u64 *)frame)[i];
	*(__be32 *)(data + client_offset) = client;
	if (partial_sum) {
		sum = partial_sum + (client & 0xffff) + (client >> 16);
		sum = (sum & 0xffff) + (sum >> 16);
		*(__u16 *)(data + client_offset - 2) = ~((sum & 0xffff) + (sum >> 16));
	}
	*(__be16 *)(data + port_offset) = port;
	if (hash_offset) { /* IPv4 TCP */
		struct addr from, vip;

		map_v4(&from, client);
		map_v4(&vip, *(__be32 *)(data + client_offset + 4));
		*(__be64 *)(data + hash_offset) = bpf_cpu_to_be64(flow_hash(
			&from, &vip, port, *(__be16 *)(data + port_offset + 2), IPPROTO_TCP, 4));
	}
	return true;
}

SEC("xdp.frags")
int generate(struct xdp_md *ctx)
{
	long grown = (void *)(long)ctx->data_end - (void *)(long)ctx->data - (long)frame_length;

	if (grown && bpf_xdp_adjust_head(ctx, grown))
		return XDP_ABORTED;
	if (!make_frame((void *)(long)ctx->data, (void *)(long)ctx->data_end))
		return XDP_ABORTED;
	bpf_tail_call(ctx, &target, 0);
	return XDP_ABORTED;
}

/* The same for tc. */
struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__type(key, __u32);
	__type(value, __u32);
	__uint(max_entries, 1);
} target_tc SEC(".maps");

SEC("tc")
int generate_tc(struct __sk_buff *skb)
{
	if (bpf_skb_pull_data(skb, 0) ||
	    !make_frame((void *)(long)skb->data, (void *)(long)skb->data_end))
		return 2; /* TC_ACT_SHOT */
	bpf_tail_call(skb, &target_tc, 0);
	return 2;
}

SEC("tc")
int nothing_tc(struct __sk_buff *skb)
{
	return 0;
}

SEC("xdp.frags")
int nothing(struct xdp_md *ctx)
{
	return XDP_TX;
}

/* What came out at the other end of live frames. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__type(key, __u32);
	__type(value, __u64);
	__uint(max_entries, 1);
} received SEC(".maps");

SEC("xdp.frags")
int sink(struct xdp_md *ctx)
{
	struct ethhdr *eth = (void *)(long)ctx->data;
	__u32 at = 0;
	__u64 *n = bpf_map_lookup_elem(&received, &at);

	if ((void *)(eth + 1) > (void *)(long)ctx->data_end || eth->h_proto != bpf_htons(ETH_P_IP))
		return XDP_PASS;
	if (n)
		(*n)++;
	return XDP_DROP;
}

/* A veth takes frames from XDP at its other end only if it has a program. */
SEC("xdp.frags")
int pass(struct xdp_md *ctx)
{
	return XDP_PASS;
}

static __always_inline void add(void *map, __u32 number, __u32 bytes)
{
	struct counter *counter = bpf_map_lookup_elem(map, &number);

	if (counter) {
		counter->packets++;
		counter->bytes += bytes;
	}
}

static __always_inline int encapsulate(struct xdp_md *ctx, __u32 source, __u32 sum, __u16 length,
				       const struct backend *backend, const struct next_hop *hop)
{
	struct ethhdr *eth;
	struct iphdr *ip;

	if (bpf_xdp_adjust_head(ctx, -(int)sizeof(*ip)))
		return XDP_DROP;
	eth = (void *)(long)ctx->data;
	ip = (void *)(eth + 1);
	if ((void *)(ip + 1) > (void *)(long)ctx->data_end)
		return XDP_DROP;
	__builtin_memcpy(eth->h_dest, hop->dst_mac, ETH_ALEN);
	__builtin_memcpy(eth->h_source, hop->src_mac, ETH_ALEN);
	eth->h_proto = bpf_htons(ETH_P_IP);
	*(__be16 *)ip = bpf_htons(0x4500);
	ip->tot_len = bpf_htons(length + sizeof(*ip));
	ip->id = 0;
	ip->frag_off = bpf_htons(IPV4_DONT_FRAGMENT);
	ip->ttl = 64;
	ip->protocol = IPPROTO_IPIP;
	ip->saddr = source;
	ip->daddr = backend->tunnel.w[3];
	sum += ip->tot_len + (source & 0xffff) + (source >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	ip->check = ~((sum & 0xffff) + (sum >> 16));
	return XDP_TX;
}

SEC("xdp.frags")
int prototype(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *data_end = (void *)(long)ctx->data_end;
	struct ethhdr *eth = data;
	struct iphdr *ip = (void *)(eth + 1);
	struct udphdr *l4 = (void *)(ip + 1);
	struct service_key key __attribute__((aligned(8)));
	struct backend *backend;
	struct next_hop *hop;
	__u32 *number, at;
	__u64 *word, *slot, hash;
	__u16 length;

	if ((void *)(l4 + 1) > data_end || eth->h_proto != bpf_htons(ETH_P_IP) || ip->ihl != 5)
		return XDP_PASS;
	map_v4(&key.vip, ip->daddr);
	*(__u32 *)&key.port = l4->dest | (__u32)ip->protocol << 16;
	number = bpf_map_lookup_elem(&services, &key);
	if (!number)
		return XDP_PASS;
	word = bpf_map_lookup_elem(&service_words, number);
	if (!word)
		return XDP_DROP;
	length = bpf_ntohs(ip->tot_len);
	{
		struct addr client;

		map_v4(&client, ip->saddr);
		hash = flow_hash(&client, &key.vip, l4->source, key.port, key.proto, 4);
	}
	at = (__u32)*word + (hash >> (64 - ((*word >> SERVICE_BITS_SHIFT) & 0xff)));
	slot = bpf_map_lookup_elem(&slots, &at);
	if (!slot)
		return XDP_DROP;
	at = *slot;
	backend = bpf_map_lookup_elem(&backends, &at);
	if (!backend)
		return XDP_DROP;
	add(&service_counters, *number, length);
	add(&backend_counters, at, length);
	at = backend->word;
	hop = bpf_map_lookup_elem(&next_hops, &at);
	if (!hop)
		return XDP_DROP;
	return encapsulate(ctx, config.node4.w[3], backend->outer_sum, length, backend, hop);
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
