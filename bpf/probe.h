/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Health checks: what a socket of the agent's sends to a VIP goes through the
 * tunnel to the one backend that is probed. The worker's answer comes back as
 * any client's does.
 */
#pragma once

#include "count.h"
#include "encap.h"
#include <linux/pkt_cls.h>

/* Everything that can stand before the inner packet, without Ethernet. */
struct outer4 {
	struct iphdr ip;
	struct geneve_outer geneve;
	__u8 address[16];
};

struct outer6 {
	struct ipv6hdr ip;
	struct geneve_outer geneve;
	__u8 address[16];
};

/* Whether the kernel knows a way to an address, from this node's own. */
static __always_inline int way_to(struct __sk_buff *skb, const struct addr *dst,
				  struct bpf_fib_lookup *fib)
{
	long found;

	fib->ifindex = skb->ifindex;
	if (is_v4(dst)) {
		fib->family = 2; /* AF_INET */
		fib->ipv4_src = config.node4.w[3];
		fib->ipv4_dst = dst->w[3];
	} else {
		fib->family = 10; /* AF_INET6 */
		copy_constant(fib->ipv6_src, &config.node6);
		__builtin_memcpy(fib->ipv6_dst, dst, sizeof(fib->ipv6_dst));
	}
	found = bpf_fib_lookup(skb, fib, sizeof(*fib), BPF_FIB_LOOKUP_OUTPUT);
	return found == BPF_FIB_LKUP_RET_SUCCESS || found == BPF_FIB_LKUP_RET_NO_NEIGH;
}

/* Puts outer headers of so many bytes in front of the packet. */
static __always_inline bool put_outer(struct __sk_buff *skb, const void *outer, __u32 bytes,
				      bool v4, bool udp)
{
	__be16 type = v4 ? bpf_htons(ETH_P_IP) : bpf_htons(ETH_P_IPV6);
	__u64 flags = BPF_F_ADJ_ROOM_FIXED_GSO |
		      (v4 ? BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 : BPF_F_ADJ_ROOM_ENCAP_L3_IPV6);

	if (udp)
		flags |= BPF_F_ADJ_ROOM_ENCAP_L4_UDP;
	return !bpf_skb_adjust_room(skb, bytes, BPF_ADJ_ROOM_MAC, flags) &&
	       !bpf_skb_store_bytes(skb, sizeof(struct ethhdr), outer, bytes, 0) &&
	       !bpf_skb_store_bytes(skb, offsetof(struct ethhdr, h_proto), &type, 2, 0);
}

static __noinline bool wrap_probe4(struct __sk_buff *skb, const struct packet *packet,
				   const struct choice *choice, __be16 port)
{
	__u32 address = packet->family == 4 ? 4 : 16;
	struct outer4 outer = {};

	if (choice->backend->mode == MODE_IPIP) {
		outer_ip4(&outer.ip, packet, choice->backend,
			  packet->family == 4 ? IPPROTO_IPIP : IPPROTO_IPV6, config.ipip4.w[3], 0);
		return put_outer(skb, &outer, sizeof(outer.ip), true, false);
	}
	outer_ip4(&outer.ip, packet, choice->backend, IPPROTO_UDP, config.node4.w[3],
		  sizeof(struct geneve_outer) + address);
	if (packet->family == 4) {
		outer_geneve(&outer.geneve, packet, choice, 4, port);
		return put_outer(skb, &outer, sizeof(outer) - 12, true, true);
	}
	outer_geneve(&outer.geneve, packet, choice, 16, port);
	return put_outer(skb, &outer, sizeof(outer), true, true);
}

static __noinline bool wrap_probe6(struct __sk_buff *skb, const struct packet *packet,
				   const struct choice *choice, __be16 port)
{
	__u32 address = packet->family == 4 ? 4 : 16;
	struct outer6 outer = {};

	if (choice->backend->mode == MODE_IPIP) {
		outer_ip6(&outer.ip, packet, choice->backend,
			  packet->family == 4 ? IPPROTO_IPIP : IPPROTO_IPV6, 0, 0);
		copy_constant(&outer.ip.saddr, &config.ipip6);
		return put_outer(skb, &outer, sizeof(outer.ip), false, false);
	}
	outer_ip6(&outer.ip, packet, choice->backend, IPPROTO_UDP, 0,
		  sizeof(struct geneve_outer) + address);
	copy_constant(&outer.ip.saddr, &config.node6);
	if (packet->family == 4) {
		outer_geneve(&outer.geneve, packet, choice, 4, port);
		return put_outer(skb, &outer, sizeof(outer) - 12, false, true);
	}
	outer_geneve(&outer.geneve, packet, choice, 16, port);
	return put_outer(skb, &outer, sizeof(outer), false, true);
}

/* To a server on the segment, which holds the VIP. */
static __always_inline int probe_neighbour(struct __sk_buff *skb, const struct backend *backend,
					   const struct bpf_fib_lookup *fib)
{
	struct bpf_redir_neigh to = {};
	__u8 macs[2 * ETH_ALEN];

	if (fib->ifindex == skb->ifindex && fib->dmac[0] + fib->dmac[1] + fib->dmac[2] +
						    fib->dmac[3] + fib->dmac[4] + fib->dmac[5]) {
		__builtin_memcpy(macs, fib->dmac, ETH_ALEN);
		__builtin_memcpy(macs + ETH_ALEN, fib->smac, ETH_ALEN);
		count_event(EVENT_PROBE);
		return bpf_skb_store_bytes(skb, 0, macs, sizeof(macs), 0) ? TC_ACT_SHOT
									  : TC_ACT_UNSPEC;
	}
	if (is_v4(&backend->tunnel)) {
		to.nh_family = 2;
		to.ipv4_nh = backend->tunnel.w[3];
	} else {
		to.nh_family = 10;
		__builtin_memcpy(to.ipv6_nh, &backend->tunnel, sizeof(to.ipv6_nh));
	}
	return bpf_redirect_neigh(fib->ifindex, &to, sizeof(to), 0);
}

/* The probed backend's row and generation, if it is still what it was. */
static __always_inline struct backend *probed(const struct probe *probe)
{
	__u32 number = probe->backend;
	struct backend *backend = bpf_map_lookup_elem(&backends, &number);

	if (!backend || generation_of(READ_ONCE(backend->word)) != probe->generation)
		return NULL;
	return backend;
}

static __always_inline int no_probe(void)
{
	count_drop(DROP_PROBE);
	return TC_ACT_SHOT;
}

/* An uplink's egress. */
static __always_inline int probe_at_uplink(struct __sk_buff *skb)
{
	struct choice choice = {.verb = VERB_DELIVER, .attempt = ATTEMPT_PROBE};
	__u64 cookie = bpf_get_socket_cookie(skb);
	struct bpf_fib_lookup fib = {};
	struct packet packet;
	struct probe *probe;
	__be16 type;
	__u32 l3;

	probe = cookie ? bpf_map_lookup_elem(&probes, &cookie) : NULL;
	if (!probe)
		return TC_ACT_UNSPEC;
	if (parse_link((void *)(long)skb->data, (void *)(long)skb->data_end, &l3, &type) ||
	    l3 != sizeof(struct ethhdr) ||
	    parse((void *)(long)skb->data, (void *)(long)skb->data_end, l3, type, &packet))
		return no_probe();
	if (is_tunnel(&packet))
		return TC_ACT_UNSPEC; /* what we redirected comes by here again */
	choice.backend = probed(probe);
	if (!choice.backend || !way_to(skb, &choice.backend->tunnel, &fib))
		return no_probe();
	if (choice.backend->mode == MODE_L2)
		return probe_neighbour(skb, choice.backend, &fib);
	choice.number = probe->backend;
	choice.word = READ_ONCE(choice.backend->word);
	if (!(outer_v4(choice.backend) ? wrap_probe4(skb, &packet, &choice, probe->port)
				       : wrap_probe6(skb, &packet, &choice, probe->port)))
		return no_probe();
	count_event(EVENT_PROBE);
	return bpf_redirect_neigh(fib.ifindex, NULL, 0, 0);
}
