/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * What Pods send: answers leave as the VIP, straight to the client. TCP and
 * ICMP errors are translated at the uplink's egress, after masquerade and
 * connection tracking; UDP at the Pod's own device, and sent from there.
 */
#pragma once

#include "flow.h"
#include "fragment.h"
#include "parse.h"
#include <linux/pkt_cls.h>
#include <stddef.h>

#define HEADERS_MAX 256	   /* bytes that must lie in the linear part */
#define TCP_OPTIONS_MAX 20 /* options walked; there is room for 40 bytes */
#define TCP_OPTION_END 0
#define TCP_OPTION_NOP 1
#define TCP_OPTION_MSS 2
#define TCP_OPTION_SCALE 3

/* A packet of a Pod, and the flow that it answers. */
struct answer {
	struct packet packet;
	struct pod_key pod;
	struct flow_key key;
	__u32 mss_at; /* offset of the MSS in the frame; 0: none */
	__u16 mss;
};

static __always_inline int parse_skb(struct __sk_buff *skb, struct packet *packet)
{
	void *data, *data_end;
	__be16 type;
	__u32 l3;

	if (skb->data_end - skb->data < HEADERS_MAX && skb->len > skb->data_end - skb->data)
		bpf_skb_pull_data(skb, skb->len < HEADERS_MAX ? skb->len : HEADERS_MAX);
	data = (void *)(long)skb->data;
	data_end = (void *)(long)skb->data_end;
	if (parse_link(data, data_end, &l3, &type))
		return PARSE_NOT_IP;
	return parse(data, data_end, l3, type, packet);
}

/* Whether {client, Pod} has a flow by one of the VIPs that the Pod serves; then
 * its key is in `answer`. */
__noinline int find_answered(struct answer *answer, const struct addr *client, __be16 client_port)
{
	__u64 now = bpf_ktime_get_coarse_ns();
	struct flow_key key = {};
	struct pod_key target;
	struct pod *pod;

	if (!answer || !client)
		return 0;
	target = answer->pod; /* before Linux 6.4, an argument cannot be a map's key */
	pod = bpf_map_lookup_elem(&pods, &target);
	if (!pod)
		return 0;
	key.client = *client;
	key.client_port = client_port;
	key.proto = target.proto;
	for (__u32 i = 0; i < POD_SERVES_MAX; i++) {
		struct flow *flow;

		if (i >= pod->count)
			break;
		key.vip = pod->serves[i].vip;
		key.vip_port = pod->serves[i].port;
		flow = flow_find(&key, now);
		if (flow && flow_of(flow, &target)) {
			answer->key = key;
			return 1;
		}
	}
	return 0;
}

/* The options of a SYN-ACK that matter: where the MSS is, and the scale. */
static __noinline void read_options(struct __sk_buff *skb, struct answer *answer,
				    struct segment *segment, __u32 end)
{
	__u32 at;

	if (!answer || !segment)
		return;
	at = answer->packet.l4 + sizeof(struct tcphdr);
	for (int i = 0; i < TCP_OPTIONS_MAX; i++) {
		__u8 option[4] = {};

		if (at + 2 > end || bpf_skb_load_bytes(skb, at, option, 2))
			return;
		if (option[0] == TCP_OPTION_END)
			return;
		if (option[0] == TCP_OPTION_NOP) {
			at++;
			continue;
		}
		if (option[1] < 2 || at + option[1] > end)
			return;
		if (option[0] == TCP_OPTION_MSS && option[1] == 4) {
			if (bpf_skb_load_bytes(skb, at, option, 4))
				return;
			answer->mss_at = at + 2;
			answer->mss = (__u16)option[2] << 8 | option[3];
		}
		if (option[0] == TCP_OPTION_SCALE && option[1] == 3) {
			if (bpf_skb_load_bytes(skb, at, option, 3))
				return;
			segment->scale = option[2];
		}
		at += option[1];
	}
}

/* Returns whether the segment could be read. */
static __always_inline bool read_segment(struct __sk_buff *skb, struct answer *answer,
					 struct segment *segment)
{
	const struct packet *packet = &answer->packet;
	struct tcphdr tcp;
	__u8 flags;
	__u32 header, data;

	if (bpf_skb_load_bytes(skb, packet->l4, &tcp, sizeof(tcp)))
		return false;
	flags = ((__u8 *)&tcp)[13];
	header = tcp.doff * 4;
	if (header < sizeof(tcp) || packet->l4 - packet->l3 + header > packet->length)
		return false;
	data = packet->length - (packet->l4 - packet->l3) - header;
	segment->seq = bpf_ntohl(tcp.seq);
	segment->end = segment->seq + data + !!(flags & TCP_SYN) + !!(flags & TCP_FIN);
	segment->ack = bpf_ntohl(tcp.ack_seq);
	segment->window = bpf_ntohs(tcp.window);
	segment->flags = flags;
	segment->scale = 0;
	if (flags & TCP_SYN)
		read_options(skb, answer, segment, packet->l4 + header);
	return true;
}

/* What the Pod's packet tells of its flow. Returns an enum drop. */
__noinline int note_answer(struct __sk_buff *skb, struct answer *answer)
{
	struct segment segment = {};
	struct flow_key key;
	struct flow *flow;
	bool confirmed;

	if (!answer)
		return DROP_NONE;
	key = answer->key;
	flow = flow_find(&key, bpf_ktime_get_coarse_ns());
	if (!flow)
		return DROP_NONE;
	flow->seen = bpf_ktime_get_coarse_ns();
	if (!flow_pending(flow) && !(flow->fins & FLOW_ARMED))
		flow_arm(&key);
	if (unlikely(flow->affinity) && (!flow_pending(flow) || key.proto == IPPROTO_UDP))
		affinity_note(&key, &answer->pod, flow->hash);
	if (key.proto == IPPROTO_UDP)
		return flow_pending(flow) ? flow_confirm(&key) : DROP_NONE;
	if (!read_segment(skb, answer, &segment))
		return DROP_NONE;
	confirmed = flow->state == FLOW_PROVISIONAL && !(segment.flags & TCP_RST);
	if ((segment.flags & (TCP_SYN | TCP_ACK)) == (TCP_SYN | TCP_ACK))
		flow_syn_ack(flow, &segment);
	else
		flow_from_pod(flow, &segment);
	return confirmed ? flow_confirm(&key) : DROP_NONE;
}

static __always_inline __u32 check_offset(const struct packet *packet)
{
	return packet->l4 + (packet->proto == IPPROTO_TCP ? offsetof(struct tcphdr, check)
							  : offsetof(struct udphdr, check));
}

/* Puts `to` in place of the source address; check_at is the offset of the
 * checksum of what follows, whose pseudo-header it stands in, or 0. */
static __always_inline int set_source(struct __sk_buff *skb, const struct packet *packet,
				      const struct addr *to, __u32 check_at, __u64 flags)
{
	__s64 sum;

	if (packet->family == 4) {
		__u32 at = packet->l3 + offsetof(struct iphdr, saddr);

		if (check_at && bpf_l4_csum_replace(skb, check_at, packet->src.w[3], to->w[3],
						    flags | BPF_F_PSEUDO_HDR | 4))
			return -1;
		if (bpf_l3_csum_replace(skb, packet->l3 + offsetof(struct iphdr, check),
					packet->src.w[3], to->w[3], 4))
			return -1;
		return bpf_skb_store_bytes(skb, at, &to->w[3], 4, 0);
	}
	sum = bpf_csum_diff((__be32 *)&packet->src, sizeof(*to), (__be32 *)to, sizeof(*to), 0);
	if (check_at && bpf_l4_csum_replace(skb, check_at, 0, sum, flags | BPF_F_PSEUDO_HDR))
		return -1;
	return bpf_skb_store_bytes(skb, packet->l3 + offsetof(struct ipv6hdr, saddr), to,
				   sizeof(*to), 0);
}

static __always_inline int clamp_mss(struct __sk_buff *skb, const struct answer *answer)
{
	__u16 most = answer->packet.family == 4 ? config.mss4 : config.mss6;
	__be16 old = bpf_htons(answer->mss), fresh = bpf_htons(most);
	/* Behind an odd number of NOPs the value lies across two 16-bit words. */
	bool odd = (answer->mss_at - answer->packet.l4) & 1;

	if (!answer->mss_at || !most || answer->mss <= most)
		return 0;
	if (bpf_l4_csum_replace(skb, check_offset(&answer->packet), odd ? answer->mss : old,
				odd ? most : fresh, 2) ||
	    bpf_skb_store_bytes(skb, answer->mss_at, &fresh, sizeof(fresh), 0))
		return -1;
	count_event(EVENT_MSS_CLAMPED);
	return 0;
}

/* Source Pod:port becomes VIP:port. A server that holds the VIP needs none. */
__noinline int translate_answer(struct __sk_buff *skb, struct answer *answer)
{
	const struct packet *packet;
	bool later;
	__u64 flags;

	if (!answer)
		return -1;
	packet = &answer->packet;
	later = packet->flags & PACKET_LATER_FRAGMENT;
	flags = packet->proto == IPPROTO_UDP ? BPF_F_MARK_MANGLED_0 : 0;
	if (!later && clamp_mss(skb, answer))
		return -1;
	count_event(EVENT_ANSWER);
	if (!later && packet->src_port != answer->key.vip_port) {
		if (bpf_l4_csum_replace(skb, check_offset(packet), packet->src_port,
					answer->key.vip_port, flags | 2) ||
		    bpf_skb_store_bytes(skb, packet->l4, &answer->key.vip_port, 2, 0))
			return -1;
	}
	if (same_addr(&packet->src, &answer->key.vip))
		return 0;
	return set_source(skb, packet, &answer->key.vip, later ? 0 : check_offset(packet), flags);
}

/* Finds, for a packet from a Pod, the flow; fills in what was parsed. */
static __always_inline bool answers(struct __sk_buff *skb, struct answer *answer)
{
	struct packet *packet = &answer->packet;

	if (packet->proto != IPPROTO_TCP && packet->proto != IPPROTO_UDP)
		return false;
	if (packet->flags & PACKET_LATER_FRAGMENT && recall_fragment(packet))
		return false;
	answer->pod.address = packet->src;
	answer->pod.port = packet->src_port;
	answer->pod.proto = packet->proto;
	if (!find_answered(answer, &packet->dst, packet->dst_port))
		return false;
	if (packet->flags & PACKET_FIRST_FRAGMENT)
		remember_fragment(packet);
	return true;
}

/*
 * The quoted packet of an ICMP error to a client was sent to the Pod; the
 * client knows the VIP. The quoted header's own checksum stays right by being
 * replaced too, so that of ICMP (IPv4) changes by the port alone.
 */
static __noinline int translate_quoted(struct __sk_buff *skb, struct answer *answer,
				       const struct packet *quoted)
{
	const struct addr *vip;
	__u32 check_at;
	__s64 sum;

	if (!answer || !quoted)
		return -1;
	vip = &answer->key.vip;
	check_at = answer->packet.l4 + offsetof(struct icmp, check);
	if (bpf_l4_csum_replace(skb, check_at, quoted->dst_port, answer->key.vip_port, 2) ||
	    bpf_skb_store_bytes(skb, quoted->l4 + 2, &answer->key.vip_port, 2, 0))
		return -1;
	if (quoted->family == 4) {
		if (bpf_l3_csum_replace(skb, quoted->l3 + offsetof(struct iphdr, check),
					quoted->dst.w[3], vip->w[3], 4) ||
		    bpf_skb_store_bytes(skb, quoted->l3 + offsetof(struct iphdr, daddr), &vip->w[3],
					4, 0))
			return -1;
		return set_source(skb, &answer->packet, vip, 0, 0);
	}
	sum = bpf_csum_diff((__be32 *)&quoted->dst, sizeof(*vip), (__be32 *)vip, sizeof(*vip), 0);
	if (bpf_l4_csum_replace(skb, check_at, 0, sum, 0) ||
	    bpf_skb_store_bytes(skb, quoted->l3 + offsetof(struct ipv6hdr, daddr), vip,
				sizeof(*vip), 0))
		return -1;
	return set_source(skb, &answer->packet, vip, check_at, 0);
}

/* An ICMP error of a Pod, or of this node, about a client's packet. */
__noinline int answer_error(struct __sk_buff *skb, struct answer *answer)
{
	struct packet quoted;
	__be16 type;
	__u32 l3;

	if (!answer || answer->packet.l4 > OFFSET_MASK)
		return TC_ACT_UNSPEC;
	type = answer->packet.family == 4 ? bpf_htons(ETH_P_IP) : bpf_htons(ETH_P_IPV6);
	l3 = (answer->packet.l4 + sizeof(struct icmp)) & OFFSET_MASK;
	if (parse_quoted((void *)(long)skb->data, (void *)(long)skb->data_end, l3, type, &quoted) ||
	    quoted.flags & PACKET_LATER_FRAGMENT || !same_addr(&quoted.src, &answer->packet.dst) ||
	    (quoted.proto != IPPROTO_TCP && quoted.proto != IPPROTO_UDP))
		return TC_ACT_UNSPEC;
	answer->pod.address = quoted.dst;
	answer->pod.port = quoted.dst_port;
	answer->pod.proto = quoted.proto;
	if (!find_answered(answer, &quoted.src, quoted.src_port) ||
	    same_addr(&quoted.dst, &answer->key.vip))
		return TC_ACT_UNSPEC;
	if (translate_quoted(skb, answer, &quoted)) {
		count_drop(DROP_MALFORMED);
		return TC_ACT_SHOT;
	}
	count_event(EVENT_ANSWER);
	return TC_ACT_UNSPEC;
}

/* The uplink's egress: everything that leaves this node. */
static __always_inline int answer_at_uplink(struct __sk_buff *skb)
{
	struct answer answer = {};
	int drop;

	if (parse_skb(skb, &answer.packet))
		return TC_ACT_UNSPEC;
	if (answer.packet.flags & PACKET_ICMP_ERROR)
		return answer_error(skb, &answer);
	if (!answers(skb, &answer))
		return TC_ACT_UNSPEC;
	drop = note_answer(skb, &answer);
	if (!drop && translate_answer(skb, &answer))
		drop = DROP_MALFORMED;
	if (!drop)
		return TC_ACT_UNSPEC;
	count_drop(drop);
	return TC_ACT_SHOT;
}

/* The device that the kernel would send an answer by; 0 when it would not. */
__noinline __u32 way_out(struct __sk_buff *skb, const struct answer *answer)
{
	struct bpf_fib_lookup fib = {.ifindex = skb->ifindex};
	long found;

	if (!answer)
		return 0;
	if (answer->packet.family == 4) {
		fib.family = 2; /* AF_INET */
		fib.ipv4_src = answer->key.vip.w[3];
		fib.ipv4_dst = answer->packet.dst.w[3];
	} else {
		fib.family = 10; /* AF_INET6 */
		__builtin_memcpy(fib.ipv6_src, &answer->key.vip, sizeof(fib.ipv6_src));
		__builtin_memcpy(fib.ipv6_dst, &answer->packet.dst, sizeof(fib.ipv6_dst));
	}
	found = bpf_fib_lookup(skb, &fib, sizeof(fib), 0);
	if (found != BPF_FIB_LKUP_RET_SUCCESS && found != BPF_FIB_LKUP_RET_NO_NEIGH)
		return 0;
	return fib.ifindex;
}

/* The host's side of a Pod's device: everything that the Pod sends. */
static __always_inline int answer_at_pod(struct __sk_buff *skb)
{
	struct answer answer = {};
	__u32 out;
	int drop;

	if (parse_skb(skb, &answer.packet))
		return TC_ACT_UNSPEC;
	if (is_tunnel(&answer.packet)) {
		count_drop(DROP_FROM_POD_TUNNEL);
		return TC_ACT_SHOT;
	}
	if (answer.packet.proto != IPPROTO_UDP || !answers(skb, &answer))
		return TC_ACT_UNSPEC;
	out = way_out(skb, &answer);
	if (!out)
		return TC_ACT_UNSPEC; /* left to the uplink's egress */
	drop = note_answer(skb, &answer);
	if (!drop && translate_answer(skb, &answer))
		drop = DROP_MALFORMED;
	if (!drop)
		return bpf_redirect_neigh(out, NULL, 0, 0);
	count_drop(drop);
	return TC_ACT_SHOT;
}
