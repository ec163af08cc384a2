/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Mode nat: the LB node translates both ends, and answers come back through it.
 * One entry in `nat_flows` a flow, for both directions. A local port is used
 * again for each backend; what has expired is taken over by who needs it.
 */
#pragma once

#include "bounce.h"
#include "encap.h"

/* No XDP action: the packet is none of ours. */
#define NAT_NOT_OURS (-1)

/* The ends of a packet, as they are to be. */
struct ends {
	struct addr src;
	struct addr dst;
	__be16 src_port;
	__be16 dst_port;
};

static __always_inline struct nat_scratch *nat_room(void)
{
	__u32 at = 0;

	return bpf_map_lookup_elem(&nat_rooms, &at);
}

static __always_inline bool nat_expired(const struct nat_flow *flow, __u8 proto, __u64 now)
{
	__u64 idle = config.idle_tcp_ns;

	if (flow->state == NAT_OPENING)
		idle = NAT_OPENING_NS;
	else if (flow->state == NAT_CLOSING)
		idle = config.idle_closing_ns;
	else if (proto == IPPROTO_UDP)
		idle = config.idle_udp_ns;
	return now - flow->seen > idle;
}

static __always_inline bool nat_of(const struct nat_flow *flow, const struct packet *packet)
{
	return flow->client_port == packet->src_port && flow->vip_port == packet->dst_port &&
	       same_addr(&flow->client, &packet->src) && same_addr(&flow->vip, &packet->dst);
}

/* Begins the key of a flow with a backend: all but the local port. */
static __always_inline bool nat_key_begin(struct nat_key *key, const struct packet *packet,
					  __u32 number, __u64 whole)
{
	struct backend *backend = bpf_map_lookup_elem(&backends, &number);
	__u32 at = whole >> 48;

	if (!backend || backend->mode != MODE_NAT)
		return false;
	key->backend = backend->address;
	key->backend_port = backend->port;
	key->proto = packet->proto;
	if (packet->family == 4) {
		if (!config.nat4_count)
			return false;
		at %= config.nat4_count;
		at &= NAT_ADDRESSES_MAX - 1;
		copy_constant(&key->local, &config.nat4[at]);
	} else {
		if (!config.nat6_count)
			return false;
		at %= config.nat6_count;
		at &= NAT_ADDRESSES_MAX - 1;
		copy_constant(&key->local, &config.nat6[at]);
	}
	return config.nat_ports;
}

static __always_inline __be16 nat_port(__u64 whole, __u32 try)
{
	__u32 offset =
		((__u32)(whole >> 16) + try * NAT_STEP) % (config.nat_ports | !config.nat_ports);

	return bpf_htons(config.nat_first + offset);
}

/* Whether a packet's flow has an entry with this backend; its key is then in
 * the scratch. */
__noinline int nat_find(const struct packet *packet, __u32 number, __u64 whole)
{
	struct nat_scratch *room = nat_room();

	if (!packet || !room || !nat_key_begin(&room->key, packet, number, whole))
		return 0;
	for (__u32 try = 0; try < NAT_TRIES; try++) {
		struct nat_flow *flow;

		room->key.local_port = nat_port(whole, try);
		flow = bpf_map_lookup_elem(&nat_flows, &room->key);
		if (flow && nat_of(flow, packet))
			return 1;
	}
	return 0;
}

/* Whether a socket of this node has, or would get, the backend's answers. */
static __noinline bool nat_shadows(struct xdp_md *ctx, const struct nat_key *key, __u8 family)
{
	struct bpf_sock_tuple tuple = {};
	__u32 size = family == 4 ? sizeof(tuple.ipv4) : sizeof(tuple.ipv6);
	struct bpf_sock *socket;

	if (family == 4) {
		tuple.ipv4.saddr = key->backend.w[3];
		tuple.ipv4.daddr = key->local.w[3];
		tuple.ipv4.sport = key->backend_port;
		tuple.ipv4.dport = key->local_port;
	} else {
		__builtin_memcpy(tuple.ipv6.saddr, &key->backend, sizeof(key->backend));
		__builtin_memcpy(tuple.ipv6.daddr, &key->local, sizeof(key->local));
		tuple.ipv6.sport = key->backend_port;
		tuple.ipv6.dport = key->local_port;
	}
	if (key->proto == IPPROTO_TCP)
		socket = bpf_skc_lookup_tcp(ctx, &tuple, size, BPF_F_CURRENT_NETNS, 0);
	else
		socket = bpf_sk_lookup_udp(ctx, &tuple, size, BPF_F_CURRENT_NETNS, 0);
	if (!socket)
		return false;
	bpf_sk_release(socket);
	return true;
}

/* Makes the entry of a new flow with this backend; its key is then in the
 * scratch. Returns 0 or an enum drop. */
__noinline int nat_open(struct xdp_md *ctx, const struct packet *packet, __u32 number, __u64 whole,
			__u64 hash)
{
	struct nat_scratch *room = nat_room();
	__u64 now = bpf_ktime_get_coarse_ns();

	if (!packet || !room || !nat_key_begin(&room->key, packet, number, whole))
		return DROP_NAT_PORTS;
	room->flow = (struct nat_flow){.client = packet->src,
				       .vip = packet->dst,
				       .client_port = packet->src_port,
				       .vip_port = packet->dst_port,
				       .state = NAT_OPENING,
				       .hash = hash,
				       .seen = now};
	for (__u32 try = 0; try < NAT_TRIES; try++) {
		struct nat_flow *flow;
		long err;

		if (try)
			count_event(EVENT_NAT_RETRY);
		room->key.local_port = nat_port(whole, try);
		flow = bpf_map_lookup_elem(&nat_flows, &room->key);
		if (flow && !nat_expired(flow, packet->proto, now))
			continue;
		if (nat_shadows(ctx, &room->key, packet->family))
			continue;
		if (config.tracing)
			return DROP_NONE;
		if (flow) /* whoever reads it now has read all of it, or none */
			bpf_map_delete_elem(&nat_flows, &room->key);
		err = bpf_map_update_elem(&nat_flows, &room->key, &room->flow, BPF_NOEXIST);
		if (!err) {
			count_event(EVENT_NAT_NEW);
			return DROP_NONE;
		}
		if (err != -EEXIST)
			return DROP_NAT_FULL;
		/* Another CPU was faster: perhaps with a packet of the same flow. */
		flow = bpf_map_lookup_elem(&nat_flows, &room->key);
		if (flow && nat_of(flow, packet))
			return DROP_NONE;
	}
	return DROP_NAT_PORTS;
}

/* What a TCP packet tells of its flow. */
static __always_inline void nat_note(struct xdp_md *ctx, const struct packet *packet,
				     struct nat_flow *flow, __u8 fin)
{
	struct tcphdr *tcp = (void *)(long)ctx->data + (packet->l4 & OFFSET_MASK);
	__u8 flags;

	if (config.tracing)
		return;
	flow->seen = bpf_ktime_get_coarse_ns();
	if (packet->proto != IPPROTO_TCP ||
	    packet->flags & (PACKET_LATER_FRAGMENT | PACKET_ICMP_ERROR) ||
	    (void *)(tcp + 1) > (void *)(long)ctx->data_end)
		return;
	flags = ((__u8 *)tcp)[13];
	if (flags & TCP_FIN)
		flow->fins |= fin;
	/* A client's reset may be forged: only the backend's ends the flow at once;
	 * after another the entry lives on for as long as a closing one. */
	if (flags & TCP_RST && fin == FLOW_FIN_POD)
		flow->state = NAT_CLOSING;
	if (flow->fins == (FLOW_FIN_CLIENT | FLOW_FIN_POD))
		flow->state = NAT_CLOSING;
	if (flags & TCP_SYN && flow->state == NAT_CLOSING) {
		flow->state = NAT_OPENING; /* the client's port again */
		flow->fins = 0;
	}
}

/* Remembers the way that a client's packet came. */
static __always_inline void nat_note_way(struct xdp_md *ctx, const struct packet *packet,
					 struct nat_flow *flow)
{
	struct ethhdr *eth = (void *)(long)ctx->data;
	struct vlan_tag *tag = (void *)(eth + 1);

	if (config.tracing || packet->flags & PACKET_ICMP_ERROR ||
	    (void *)(tag + 1) > (void *)(long)ctx->data_end)
		return;
	flow->ifindex = ctx->ingress_ifindex;
	__builtin_memcpy(flow->dst_mac, eth->h_source, ETH_ALEN);
	__builtin_memcpy(flow->src_mac, eth->h_dest, ETH_ALEN);
	flow->vlan = packet->l3 > sizeof(*eth) ? tag->tci : 0;
}

/* Adds two addresses as they lie, word by word: to load all words before adding
 * any would take more stack than there is. */
static __always_inline __u32 add_pair(__u32 sum, const void *pair, int words)
{
	const __u16 *from = pair;

	for (int i = 0; i < words; i++) {
		sum += from[i];
		asm volatile("" : "+r"(sum));
	}
	return sum;
}

/* The ends of a TCP or UDP packet are replaced, with the checksums. */
static __noinline bool replace_ends(struct xdp_md *ctx, const struct packet *packet,
				    const struct ends *to)
{
	void *data = (void *)(long)ctx->data, *data_end = (void *)(long)ctx->data_end;
	void *l3 = data + (packet->l3 & OFFSET_MASK);
	__be16 *ports = data + (packet->l4 & OFFSET_MASK);
	__u32 from = 0, sum = addr_sum(&to->src) + addr_sum(&to->dst);
	__u16 *check;

	if (packet->family == 4) {
		struct iphdr *ip = l3;

		if ((void *)(ip + 1) > data_end)
			return false;
		/* The sums of addresses as they are mapped: 0xffff is none. */
		from = add_pair(0, &ip->saddr, 4);
		ip->saddr = to->src.w[3];
		ip->daddr = to->dst.w[3];
		ip->check = move_sum(ip->check, from, sum);
	} else {
		struct ipv6hdr *ip = l3;

		if ((void *)(ip + 1) > data_end)
			return false;
		from = add_pair(0, &ip->saddr, 16);
		__builtin_memcpy(&ip->saddr, &to->src, sizeof(ip->saddr));
		__builtin_memcpy(&ip->daddr, &to->dst, sizeof(ip->daddr));
	}
	if (packet->flags & PACKET_LATER_FRAGMENT)
		return true;
	if (packet->proto == IPPROTO_TCP) {
		if ((void *)ports + sizeof(struct tcphdr) > data_end)
			return false;
		check = (void *)ports + offsetof(struct tcphdr, check);
	} else {
		if ((void *)ports + sizeof(struct udphdr) > data_end)
			return false;
		check = (void *)ports + offsetof(struct udphdr, check);
	}
	from += (__u32)ports[0] + ports[1];
	sum += (__u32)to->src_port + to->dst_port;
	ports[0] = to->src_port;
	ports[1] = to->dst_port;
	if (packet->proto == IPPROTO_UDP && !*check)
		return true; /* none was sent (RFC 768) */
	*check = move_sum(*check, from, sum);
	if (packet->proto == IPPROTO_UDP && !*check)
		*check = 0xffff;
	return true;
}

/*
 * An ICMP error: its own ends become outer's, and those that it quotes `quoted`.
 * The quoted transport checksum stays as it was: often it is not quoted, and
 * nobody checks it.
 */
static __noinline bool replace_quoted(struct xdp_md *ctx, const struct packet *packet,
				      const struct ends *outer, const struct ends *quoted)
{
	void *data = (void *)(long)ctx->data, *data_end = (void *)(long)ctx->data_end;
	struct icmp *icmp = data + (packet->l4 & OFFSET_MASK);
	void *l3 = data + (packet->l3 & OFFSET_MASK), *inner = icmp + 1;
	__be16 *ports = data + (packet->quoted & OFFSET_MASK);
	__u32 from, sum;

	if (inner > data_end || (void *)(ports + 2) > data_end)
		return false;
	from = (__u32)ports[0] + ports[1];
	sum = (__u32)quoted->src_port + quoted->dst_port;
	ports[0] = quoted->src_port;
	ports[1] = quoted->dst_port;
	if (packet->family == 4) {
		struct iphdr *ip = l3, *in = inner;

		if ((void *)(ip + 1) > data_end || (void *)(in + 1) > data_end)
			return false;
		ip->check = move_sum(ip->check, add_pair(0, &ip->saddr, 4),
				     addr_sum(&outer->src) + addr_sum(&outer->dst));
		ip->saddr = outer->src.w[3];
		ip->daddr = outer->dst.w[3];
		in->check = move_sum(in->check, add_pair(0, &in->saddr, 4),
				     addr_sum(&quoted->src) + addr_sum(&quoted->dst));
		in->saddr = quoted->src.w[3];
		in->daddr = quoted->dst.w[3];
		/* The quoted header's sum, with its checksum, has not changed. */
	} else {
		struct ipv6hdr *ip = l3, *in = inner;

		if ((void *)(ip + 1) > data_end || (void *)(in + 1) > data_end)
			return false;
		from = add_pair(add_pair(from, &ip->saddr, 16), &in->saddr, 16);
		sum = add_pair(add_pair(sum, outer, 16), quoted, 16);
		__builtin_memcpy(&ip->saddr, &outer->src, sizeof(ip->saddr));
		__builtin_memcpy(&ip->daddr, &outer->dst, sizeof(ip->daddr));
		__builtin_memcpy(&in->saddr, &quoted->src, sizeof(in->saddr));
		__builtin_memcpy(&in->daddr, &quoted->dst, sizeof(in->daddr));
	}
	icmp->check = move_sum(icmp->check, from, sum);
	return true;
}

/* The client's packet becomes one of this node's to the backend. */
__noinline int nat_to_backend(struct xdp_md *ctx, const struct packet *packet)
{
	struct nat_scratch *room = nat_room();
	struct ends to, quoted;

	if (!packet || !room)
		return 0;
	to.src = room->key.local;
	to.src_port = room->key.local_port;
	to.dst = room->key.backend;
	to.dst_port = room->key.backend_port;
	if (!(packet->flags & PACKET_ICMP_ERROR))
		return replace_ends(ctx, packet, &to);
	quoted.src = to.dst;
	quoted.src_port = to.dst_port;
	quoted.dst = to.src;
	quoted.dst_port = to.src_port;
	return replace_quoted(ctx, packet, &to, &quoted);
}

/* The backend's packet becomes one of the VIP's to the client. */
__noinline int nat_to_client(struct xdp_md *ctx, const struct packet *packet)
{
	struct nat_scratch *room = nat_room();
	struct ends to, quoted;

	if (!packet || !room)
		return 0;
	to.src = room->flow.vip;
	to.src_port = room->flow.vip_port;
	to.dst = room->flow.client;
	to.dst_port = room->flow.client_port;
	if (!(packet->flags & PACKET_ICMP_ERROR))
		return replace_ends(ctx, packet, &to);
	quoted.src = to.dst;
	quoted.src_port = to.dst_port;
	quoted.dst = to.src;
	quoted.dst_port = to.src_port;
	return replace_quoted(ctx, packet, &to, &quoted);
}

/* Who has a client's flow, or takes it: a backend whose entry's key is then in
 * the scratch, or one on this node. Returns its number, or minus an enum drop. */
__noinline int nat_choose(struct xdp_md *ctx, const struct packet *packet, __u32 service,
			  __u64 hash, __u32 owned)
{
	struct ask ask = {};
	struct backend *backend;
	bool error;
	int drop;

	if (!packet)
		return -DROP_MALFORMED;
	drop = locate(&ask, packet, service, hash);
	if (drop)
		return -drop;
	error = packet->flags & PACKET_ICMP_ERROR;
	for (__u32 attempt = ATTEMPT_SLOT; attempt < ATTEMPTS_MAX; attempt++) {
		__u32 number = attempted(&ask, attempt);

		backend = bpf_map_lookup_elem(&backends, &number);
		if (!number || !backend || !may_own(READ_ONCE(backend->word), packet->proto))
			continue;
		if (backend->mode == MODE_LOCAL ? owned : nat_find(packet, number, ask.flow))
			return number;
	}
	if (error)
		return -DROP_ICMP_UNRELATED;
	if (packet->proto == IPPROTO_TCP && !(packet->flags & PACKET_SYN))
		return -DROP_NAT_UNKNOWN;
	drop = order(&ask, 0);
	if (drop)
		return -drop;
	backend = bpf_map_lookup_elem(&backends, &ask.number);
	if (backend && backend->mode != MODE_LOCAL)
		drop = nat_open(ctx, packet, ask.number, ask.flow, hash);
	return drop ? -drop : (int)ask.number;
}

/* A client's packet of a service of mode nat, to the backend that was chosen.
 * Returns what `send` does. */
__noinline int nat_forward(struct xdp_md *ctx, struct packet *packet, __u32 service, int number)
{
	struct nat_scratch *room = nat_room();
	struct choice choice = {};
	struct next_hop asked, *hop;
	struct nat_flow *flow;
	int err;

	if (!packet || !room)
		return XDP_DROP;
	if (number <= 0)
		return xdp_drop(-number);
	choice.number = number;
	choice.service = service;
	choice.backend = bpf_map_lookup_elem(&backends, &choice.number);
	if (!choice.backend)
		return xdp_drop(DROP_NO_BACKEND);
	choice.word = READ_ONCE(choice.backend->word);
	TRACING(to->backend = choice.number; to->steps |= TRACE_BACKEND);
	if (choice.backend->mode == MODE_LOCAL) {
		count_choice(packet, &choice);
		return -number;
	}
	flow = bpf_map_lookup_elem(&nat_flows, &room->key);
	if (flow) {
		nat_note(ctx, packet, flow, FLOW_FIN_CLIENT);
		nat_note_way(ctx, packet, flow);
	}
	err = find_way(ctx, packet, &choice, &asked, &hop);
	if (err != WAY_FOUND)
		return err;
	if (!take_hop(ctx, packet) || !nat_to_backend(ctx, packet))
		return xdp_drop(DROP_MALFORMED);
	err = reframe(ctx, packet, hop);
	if (err)
		return xdp_drop(err);
	count_choice(packet, &choice);
	return leave(ctx, hop);
}

/* Whether an address is one of this node's for mode nat. */
static __always_inline bool nat_local(const struct packet *packet)
{
	struct addr own;

	for (__u32 i = 0; i < NAT_ADDRESSES_MAX; i++) {
		if (i < (packet->family == 4 ? config.nat4_count : config.nat6_count)) {
			copy_constant(&own,
				      packet->family == 4 ? &config.nat4[i] : &config.nat6[i]);
			if (same_addr(&own, &packet->dst))
				return true;
		}
	}
	return false;
}

/* Fills the key of a backend's packet, or of one that an error quotes. The
 * error's own source is then in no key: anybody on the way may send it. */
static __always_inline bool nat_answered(struct xdp_md *ctx, struct packet *packet,
					 struct nat_key *key)
{
	if (packet->flags & PACKET_ICMP_ERROR && quoted_flow(ctx, packet))
		return false;
	if (packet->flags & PACKET_LATER_FRAGMENT && recall_fragment(packet))
		return false;
	if ((packet->proto != IPPROTO_TCP && packet->proto != IPPROTO_UDP) ||
	    (__u32)(bpf_ntohs(packet->dst_port) - config.nat_first) >= config.nat_ports)
		return false;
	key->backend = packet->src;
	key->backend_port = packet->src_port;
	key->local = packet->dst;
	key->local_port = packet->dst_port;
	key->proto = packet->proto;
	return true;
}

/* A packet to a local address of mode nat: a backend's answer goes to the
 * client, everything else up the stack. Returns an XDP action or NAT_NOT_OURS. */
__noinline int nat_answer(struct xdp_md *ctx, struct packet *packet)
{
	struct nat_scratch *room = nat_room();
	struct nat_flow *flow;
	struct next_hop hop = {};
	int drop;

	if (!packet || !room ||
	    parse_transport((void *)(long)ctx->data, (void *)(long)ctx->data_end, packet, false) ||
	    packet->l3 + packet->length > bpf_xdp_get_buff_len(ctx) ||
	    !nat_answered(ctx, packet, &room->key))
		return NAT_NOT_OURS;
	flow = bpf_map_lookup_elem(&nat_flows, &room->key);
	if (!flow || !flow->ifindex)
		return NAT_NOT_OURS;
	if (packet->flags & PACKET_FIRST_FRAGMENT && !(packet->flags & PACKET_ICMP_ERROR))
		remember_fragment(packet);
	if (packet->ttl <= 1)
		return reply_error(ctx, packet, EVENT_TIME_EXCEEDED, 0);
	if (flow->state == NAT_OPENING && !(packet->flags & PACKET_ICMP_ERROR) && !config.tracing)
		flow->state = NAT_OPEN;
	nat_note(ctx, packet, flow, FLOW_FIN_POD);
	room->flow = *flow;
	hop.ifindex = flow->ifindex;
	hop.vlan = flow->vlan;
	__builtin_memcpy(hop.dst_mac, flow->dst_mac, ETH_ALEN);
	__builtin_memcpy(hop.src_mac, flow->src_mac, ETH_ALEN);
	if (!take_hop(ctx, packet) || !nat_to_client(ctx, packet))
		return xdp_drop(DROP_MALFORMED);
	drop = reframe(ctx, packet, &hop);
	if (drop)
		return xdp_drop(drop);
	count_event(EVENT_ANSWER);
	return leave(ctx, &hop);
}
