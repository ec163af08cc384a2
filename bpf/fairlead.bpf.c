// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/* Entry points only. One object for both roles; `config` says which are on. */
#include <linux/pkt_cls.h>
#include "answer.h"
#include "encap.h"
#include "fragment.h"
#include "gate.h"
#include "nat.h"
#include "probe.h"
#include "select.h"
#include "tunnel.h"

/* No XDP action: the packet goes on. */
#define CONTINUE (-1)

/* What most packets are not: malformed, fragments, ICMP, other protocols.
 * Returns an XDP action, or CONTINUE when the flow is now in `packet`. */
__noinline int unusual(struct xdp_md *ctx, struct packet *packet, int err)
{
	if (!packet || !is_vip(&packet->dst))
		return xdp_pass();
	if (!err && packet->flags & PACKET_ECHO)
		return reply_echo(ctx, packet);
	if (!err && packet->flags & PACKET_ICMP_ERROR)
		err = quoted_flow(ctx, packet);
	else if (!err && packet->flags & PACKET_LATER_FRAGMENT)
		err = recall_fragment(packet);
	if (!err && packet->proto != IPPROTO_TCP && packet->proto != IPPROTO_UDP)
		err = DROP_PROTOCOL;
	if (err)
		return xdp_drop(err);
	if (packet->flags & PACKET_FIRST_FRAGMENT && !(packet->flags & PACKET_ICMP_ERROR))
		remember_fragment(packet);
	return CONTINUE;
}

static __always_inline bool complete(struct xdp_md *ctx, const struct packet *packet)
{
	__u32 end = packet->l3 + packet->length;

	return end <= (__u32)(ctx->data_end - ctx->data) || end <= bpf_xdp_get_buff_len(ctx);
}

__noinline int no_service(const struct packet *packet)
{
	if (!packet || !is_vip(&packet->dst))
		return xdp_pass();
	return xdp_drop(packet->flags & PACKET_ICMP_ERROR ? DROP_ICMP_UNRELATED : DROP_NO_SERVICE);
}

/* The backend is on this node: no tunnel, and no hop less. */
static __always_inline int deliver_here(struct xdp_md *ctx, struct packet *packet,
					const struct choice *choice)
{
	struct pod_key pod = {.address = choice->backend->address,
			      .port = choice->backend->port,
			      .proto = packet->proto};
	int drop = claim(ctx, packet, &pod, choice->hash, choice->verb);

	if (drop == CLAIM_COOKIE)
		return send_cookie(ctx, packet, &pod);
	if (drop == CLAIM_DENIED)
		return deliver_to(ctx, packet,
				  denied(ctx, packet, choice->service, choice->hash,
					 denial(choice->attempt, choice->number, false)),
				  choice->hash);
	if (drop)
		return xdp_drop(drop);
	count_choice(packet, choice);
	return deliver(ctx, packet, &pod);
}

static __always_inline int balance(struct xdp_md *ctx, struct packet *packet)
{
	int err = parse_transport((void *)(long)ctx->data, (void *)(long)ctx->data_end, packet,
				  false);
	struct choice choice;
	__u64 service_word, word;
	__u32 *service, slot;

	trace_packet(packet);
	if (unlikely(!err && !complete(ctx, packet)))
		err = DROP_MALFORMED;
	if (unlikely(err || packet->flags & ~PACKET_SYN ||
		     (packet->proto != IPPROTO_TCP && packet->proto != IPPROTO_UDP))) {
		int action = unusual(ctx, packet, err);

		if (action != CONTINUE)
			return action;
	}
	service = find_service(&packet->dst, packet->dst_port, packet->proto);
	if (unlikely(!service))
		return no_service(packet);
	choice.service = *service;
	service_word = read_service(choice.service);
	choice.hash = slot_hash(packet, service_word);
	err = find_slot(choice.service, choice.hash, service_word, &slot, &word);
	if (unlikely(service_flags(service_word) & SERVICE_GATED) && !err)
		err = gate(packet, choice.service, service_flags(service_word));
	if (unlikely(service_flags(service_word) & SERVICE_NAT) && !err) {
		err = nat_choose(ctx, packet, choice.service, choice.hash,
				 config.backend && owned_here(ctx, packet));
		return deliver_to(ctx, packet, nat_forward(ctx, packet, choice.service, err),
				  choice.hash);
	}
	if (unlikely(!err && contested(word)))
		return deliver_to(ctx, packet,
				  contest(ctx, packet, choice.service, choice.hash,
					  config.backend && owned_here(ctx, packet)),
				  choice.hash);
	if (!err)
		err = choose(packet, service_word, slot, word, &choice);
	if (unlikely(err))
		return xdp_drop(err);
	if (config.backend && choice.backend->mode == MODE_LOCAL)
		return deliver_here(ctx, packet, &choice);
	return forward(ctx, packet, &choice);
}

SEC("xdp.frags")
int fairlead_xdp(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *data_end = (void *)(long)ctx->data_end;
	struct packet packet;
	__be16 type;
	__u32 l3;

	if (parse_link(data, data_end, &l3, &type) ||
	    parse_addresses(data, data_end, l3, type, &packet))
		return xdp_pass();
	if (tunnel_here(data, data_end, &packet))
		return unwrap(ctx, &packet);
	if (config.lb && maybe_vip(&packet.dst))
		return balance(ctx, &packet);
	if (config.lb && config.nat_ports && nat_local(&packet)) {
		int action = nat_answer(ctx, &packet);

		if (action != NAT_NOT_OURS)
			return action;
	}
	if (config.lb && (packet.proto == IPPROTO_ICMP || packet.proto == IPPROTO_ICMPV6) &&
	    to_this_node(&packet))
		note_unreachable(ctx, &packet);
	trace_packet(&packet);
	return xdp_pass();
}

SEC("tc")
int fairlead_egress(struct __sk_buff *skb)
{
	return answer_at_uplink(skb);
}

SEC("tc")
int fairlead_pod(struct __sk_buff *skb)
{
	return answer_at_pod(skb);
}

SEC("tc")
int fairlead_probe(struct __sk_buff *skb)
{
	return probe_at_uplink(skb);
}

/* Go's types are made from this object's BTF, which has only what is named. */
const struct named {
	enum service_flag service_flag;
	enum rate_kind rate_kind;
	enum mode mode;
	enum nat_state nat_state;
	enum backend_state backend_state;
	enum flow_state flow_state;
	enum flow_fin flow_fin;
	enum verb verb;
	enum verdict verdict;
	enum drop drop;
	enum event event;
	enum trace_step trace_step;
	enum packet_flag packet_flag;
	struct tunnel_option tunnel_option;
} *named __attribute__((unused));

char LICENSE[] SEC("license") = "Dual BSD/GPL";
