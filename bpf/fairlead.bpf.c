// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/* Entry points only. One object for both roles; `config` says which are on. */
#include <linux/pkt_cls.h>
#include "fairlead.h"
#include "maps.h"
#include "parse.h"
#include "hash.h"

SEC("xdp.frags")
int fairlead_xdp(struct xdp_md *ctx)
{
	return XDP_PASS;
}

SEC("tc")
int fairlead_egress(struct __sk_buff *skb)
{
	return TC_ACT_UNSPEC;
}

SEC("tc")
int fairlead_pod(struct __sk_buff *skb)
{
	return TC_ACT_UNSPEC;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
