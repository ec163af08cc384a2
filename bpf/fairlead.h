/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * The contract between the BPF programs and Go: keys, values, words, verdicts
 * and drop reasons. Go's types are generated from this file by bpf2go, so
 * nothing here is declared twice; reasons.h belongs to it. No unions, no
 * bit-fields, explicit padding.
 *
 * Addresses are 16 bytes in network order, IPv4 as v4-mapped (::ffff:a.b.c.d).
 * Ports are in network order wherever the type is __be16.
 */
#pragma once

#include <linux/bpf.h>
#include <linux/types.h>
#include "reasons.h"

/* Raised whenever a key or a value of a map that outlives the agent changes, or
 * what it means: flows, pending, fragments, pods. */
#define LAYOUT_VERSION 1

struct addr {
	__be32 w[4];
};

/* ---- Services and slots (role lb) ------------------------------------- */

/*
 * services: service_key -> service number (__u32). A VIP itself is the key
 * {vip, 0, 0} with the number SERVICE_NONE: it says that the address is a VIP
 * when no (port, proto) matches. The number is fixed while the service lives.
 */
struct service_key {
	struct addr vip;
	__be16 port;
	__u8 proto; /* IPPROTO_TCP, IPPROTO_UDP, or 0 for the VIP itself */
	__u8 pad;
};

#define SERVICE_NONE 0U

/*
 * service_words[number], one mapped 64-bit word each:
 *   bits 0-31   offset of the service's run in `slots`
 *   bits 32-39  log2 of the number of its slots; 0 means: no slots, no backend
 *   bits 40-63  SERVICE_* flags
 */
#define SERVICE_BITS_SHIFT 32
#define SERVICE_FLAGS_SHIFT 40

enum service_flag {
	SERVICE_INDEPENDENT = 1 << 0, /* datagrams are never questions */
	SERVICE_ORDERS = 1 << 1,      /* modes ipip and l2: there is nobody to ask */
	SERVICE_NAT = 1 << 2,	      /* mode nat: flows are this node's own */
	SERVICE_RANGES = 1 << 3,      /* only clients in source_ranges */
	SERVICE_LIMITS = 1 << 4,      /* see service_limits */
	SERVICE_AFFINITY = 1 << 5,    /* the slot is of the client's address alone */
};

#define SERVICE_GATED (SERVICE_RANGES | SERVICE_LIMITS)

/* source_ranges (LPM trie): the clients of a service with SERVICE_RANGES.
 * prefix_len counts from the start of `service`. */
struct source_key {
	__u32 prefix_len;
	__u32 service; /* number, in network order, as the trie walks it */
	struct addr address;
};

/*
 * Rates, as token buckets that are shared by all CPUs: `until` is when the
 * bucket is full again, which each packet moves on by its cost, at most `burst`
 * beyond now (GCRA, ITU-T I.371). In ticks of 1/1024 ns; cost is that of one
 * unit in 1/1024 ticks, 0: no limit.
 */
enum rate_kind {
	RATE_CONNECTIONS = 0, /* TCP SYNs */
	RATE_PACKETS = 1,
	RATE_BITS = 2, /* of the L3 packet */
};

#define RATES 3

#define TICKS_SHIFT 10
#define RATE_COST_SHIFT 10

struct rates {
	__u64 cost[RATES];
	__u64 burst[RATES];
};

struct bucket {
	__u64 until[RATES];
};

/* service_limits: number of a service with SERVICE_LIMITS -> its rates. */
struct service_limit {
	struct rates all;
	struct rates client; /* of each address (IPv4) or /64 (IPv6) */
	struct bucket bucket;
};

/* client_buckets (LRU) */
struct client_key {
	struct addr client;
	__u32 service;
	__u32 pad;
};

/*
 * slots[offset + (hash >> (64 - log2))], one mapped 64-bit word each:
 *   bits 0-31   number of the backend that takes new flows (0: none)
 *   bits 32-63  row in `candidates` that may own older flows; 0: settled
 */
#define SLOT_CANDIDATES_SHIFT 32

#define CANDIDATES_MAX 7

/* candidates[row]: mapped, written before a slot names the row and fixed until
 * none does. Backends that may own older flows, newest first; 0: no more. */
struct candidate_row {
	__u32 number[CANDIDATES_MAX];
	__u32 pad;
};

/* hints (LRU): the hash of a flow -> who was last asked, or told to take it. */
struct hint {
	__u32 backend;
	__u32 generation;
};

/* The attempts of a question; in an order, ATTEMPT_ORDER and how many slots
 * after the flow's own its backend was looked for. */
#define ATTEMPT_HINT 0
#define ATTEMPT_SLOT 1
#define ATTEMPT_CANDIDATE 2
#define ATTEMPTS_MAX (ATTEMPT_CANDIDATE + CANDIDATES_MAX)
#define ATTEMPT_ORDER 0x40
/* An order to the named Pod alone, whoever has or had the flow: a health check,
 * whose flows count for nothing and have the hash 0. */
#define ATTEMPT_PROBE 0x80

/*
 * denials[hash & DENIALS_MASK], one 64-bit word each: when a TCP flow that
 * nobody has was first denied. Its packets are dropped for UNOWNED_MS, since
 * its owner may not be known here yet, and ordered to the slot's backend then.
 *   bits 0-15   of the flow: bits 16-31 of the hash
 *   bits 16-63  coarse boot-time clock, ms
 */
#define DENIALS_MASK 0xffff
#define UNOWNED_MS 3000	      /* TCP repeats */
#define DENIAL_BUSY_MS 10000  /* until another flow may take the cell */
#define DENIAL_STALE_MS 60000 /* after that it is a first denial again */

/*
 * budgets (per CPU): attempts beyond the first of one service and client
 * prefix (/24, /56) within a second: config.budget_floor, and one for each
 * BUDGET_PART packets of the service.
 */
struct budget {
	__u64 second;
	__u64 packets; /* of the service, when the second began */
	__u64 spent;
};

#define BUDGETS_MASK 4095
#define BUDGET_PART 5

/*
 * vip_bits: a mapped bitmap of hashed VIPs, so that what is for none of them
 * leaves early. With `a` the address as two little-endian words,
 *   bit = ((a[0] * VIP_BITS_MIX0 + a[1]) * VIP_BITS_MIX1) >> (64 - VIP_BITS_LOG2)
 * is bit (bit & 63) of word bit >> 6. Set before a VIP's first service, cleared
 * after its last. A bit too many costs a look-up, never a packet.
 */
#define VIP_BITS_LOG2 18
#define VIP_BITS_WORDS (1 << (VIP_BITS_LOG2 - 6))
#define VIP_BITS_MIX0 0x9e3779b97f4a7c15ULL
#define VIP_BITS_MIX1 0xc2b2ae3d27d4eb4fULL

/* Bounds on what is walked. */
#define VLAN_TAGS_MAX 2
#define EXTENSION_HEADERS_MAX 6
#define STAND_INS_MAX 8 /* slots tried after the flow's own */

/* ---- Backends and next hops (role lb) --------------------------------- */

enum mode {
	MODE_NONE = 0,
	MODE_GENEVE = 1, /* Geneve with IP payload and the option below */
	MODE_IPIP = 2,	 /* IPv4-in-IPv4, IPv6-in-IPv6, IPv4-in-IPv6 */
	MODE_LOCAL = 3,	 /* the backend is on this node: no tunnel */
	MODE_L2 = 4,	 /* the destination MAC is rewritten, the packet stays */
	MODE_NAT = 5,	 /* both addresses and ports are rewritten */
};

enum backend_state {
	BACKEND_UNUSED = 0,
	BACKEND_ACTIVE = 1,
	BACKEND_DRAINING = 2,
	BACKEND_GONE = 3,    /* skipped from the one store that says so */
	BACKEND_FAILING = 4, /* like draining, but UDP flows leave at once */
};

/*
 * backends[number]: a mapped row of one cache line. All but `word` is written
 * before a slot names the number, and fixed until it is free again.
 *   word bits 0-31   row in next_hops; 0: not resolved, ask the kernel's FIB
 *        bits 32-55  generation: which incarnation of the address and port
 *        bits 56-63  enum backend_state
 */
struct backend {
	struct addr address; /* the Pod, or the server that holds the VIP */
	struct addr tunnel;  /* outer destination: the backend's node */
	__u64 tag;	     /* of that node; goes into the option as it is */
	__u32 outer_sum;     /* see below */
	__be16 port;	     /* of the Pod */
	__u8 mode;	     /* enum mode */
	__u8 pad0;
	__u64 pad1;
	__u64 word;
};

/*
 * outer_sum: for an IPv4 outer header, the 32-bit sum of its 16-bit words (as
 * they lie in memory) but for TOS, total length and source, which are added
 * for each packet: version and IHL, DF, TTL, protocol and destination.
 */

#define BACKEND_GENERATION_SHIFT 32
#define BACKEND_GENERATION_MASK 0xffffffU
#define BACKEND_STATE_SHIFT 56

/* probes (LRU): cookie of a health check's socket -> where its packets go. */
struct probe {
	__u32 backend;
	__u32 generation;
	__be16 port; /* that is probed */
	__u16 pad;
};

/* next_hops[row]: mapped, written once before a backend's word points to it. */
struct next_hop {
	__u32 ifindex; /* of the device that carries XDP; never a VLAN device */
	__u8 dst_mac[6];
	__u8 src_mac[6];
	__be16 vlan; /* TCI of the tag to push; 0: none */
	__u16 mtu;   /* of the route: L3 bytes of an encapsulated packet */
	__u32 pad;
};

/* ---- Flows of mode nat (role lb) ---------------------------------------- */

/*
 * nat_flows: one entry a flow, for both directions, keyed by what the backend
 * sees. Answers find it so; the client's packets try NAT_TRIES local ports that
 * follow from the flow's hash, and compare what is in the entry.
 */
struct nat_key {
	struct addr backend;
	struct addr local;
	__be16 backend_port;
	__be16 local_port;
	__u8 proto;
	__u8 pad[3];
};

enum nat_state {
	NAT_OPENING = 1, /* not answered yet */
	NAT_OPEN = 2,
	NAT_CLOSING = 3, /* a reset, or both FINs, were seen */
};

struct nat_flow {
	struct addr client;
	struct addr vip;
	__be16 client_port;
	__be16 vip_port;
	__u8 state;    /* enum nat_state */
	__u8 fins;     /* enum flow_fin: FLOW_FIN_CLIENT, FLOW_FIN_POD */
	__be16 vlan;   /* TCI; with what follows, the way that the client's packets */
	__u32 ifindex; /* came, and answers go */
	__u8 dst_mac[6];
	__u8 src_mac[6];
	__u64 hash; /* that chose the slot */
	__u64 seen; /* coarse boot-time clock, ns */
};

#define NAT_TRIES 8
#define NAT_STEP 1031 /* from one try to the next */
#define NAT_ADDRESSES_MAX 8
#define NAT_OPENING_NS (30ULL * 1000000000ULL)

/* nat_rooms[0], per CPU: what has no place on the stack. */
struct nat_scratch {
	struct nat_key key;
	struct nat_flow flow;
};

/* ---- The backend's node (role backend) -------------------------------- */

/* pods: which {VIP, port} a Pod's {address, port, proto} serves. A server
 * that holds the VIP itself stands here with VIP and port as its own. */
struct pod_key {
	struct addr address;
	__be16 port;
	__u8 proto;
	__u8 pad;
};

struct vip_port {
	struct addr vip;
	__be16 port;
	/* How long a client's new flows go to the Pod of the older ones: seconds,
	 * and from AFFINITY_COARSE on that many times four; 0: not at all. */
	__u16 affinity;
};

#define AFFINITY_COARSE 0x8000

#define POD_SERVES_MAX 8

struct pod {
	__u32 count; /* entries of serves[] in use, 1..POD_SERVES_MAX */
	struct vip_port serves[POD_SERVES_MAX];
};

/*
 * flows (confirmed) and pending (LRU; not yet): one entry a flow, keyed by
 * what the client sees. Answers find it through `pods`.
 */
struct flow_key {
	struct addr client;
	struct addr vip;
	__be16 client_port;
	__be16 vip_port;
	__u8 proto;
	__u8 pad[3];
};

enum flow_state {
	FLOW_HALF_OPEN = 1,   /* pending: a SYN was delivered */
	FLOW_UNANSWERED = 2,  /* pending: UDP was delivered */
	FLOW_PROVISIONAL = 3, /* pending: other TCP was delivered */
	FLOW_ESTABLISHED = 4, /* flows */
	FLOW_CLOSING = 5,     /* flows: a FIN or a reset was seen */
};

struct flow {
	struct bpf_timer timer; /* used in `flows` alone: expiry without the agent */
	struct addr pod;
	__be16 pod_port;
	__u8 state;	/* enum flow_state */
	__u8 fins;	/* enum flow_fin: what was seen of its end, and its beginning */
	__u8 pod_scale; /* window scale that the Pod offered */
	__u8 pad;
	__u16 affinity; /* of its VIP and port, as in struct vip_port */
	__u64 hash;	/* keyed; the top bits are the slot */
	__u64 seen;	/* coarse boot-time clock of the last packet, ns */
	/* TCP sequence numbers, host order, all in the Pod's view. */
	__u32 pod_isn;	  /* of its SYN-ACK, once seen */
	__u32 pod_ack;	  /* the highest that the Pod has acknowledged */
	__u32 pod_seq;	  /* the end of what the Pod has sent */
	__u32 pod_window; /* the Pod's receive window, scaled */
	__u32 client_fin; /* sequence number just after the client's FIN */
	__u32 pod_fin;	  /* sequence number just after the Pod's FIN */
};

enum flow_fin {
	FLOW_FIN_CLIENT = 1 << 0,
	FLOW_FIN_POD = 1 << 1,
	FLOW_SYN_ACK = 1 << 2,	     /* pod_isn is known */
	FLOW_FIN_POD_ACKED = 1 << 3, /* by the client */
	FLOW_CLOSED = 1 << 4,	     /* both FINs acknowledged, or reset: a SYN starts anew */
	FLOW_ARMED = 1 << 5,	     /* the timer runs */
};

/* affinities: who owns a client of a service with ClientIP affinity, keyed as
 * its flows with client_port 0. Good for `affinity` after `seen`. */
struct affinity {
	struct addr pod;
	__be16 pod_port;
	__u16 affinity;
	__u32 pad;
	__u64 hash;
	__u64 seen; /* coarse boot-time clock, ns; moved on once a second */
};

/* floods: Pods' ports whose SYNs are counted. From `threshold` a second on they
 * are answered with cookies. */
struct flood {
	__u64 second;
	__u64 syns;    /* in it */
	__u64 until;   /* cookies are sent; coarse boot-time clock, ns */
	__u64 through; /* when a SYN was last let through, meanwhile */
	__u64 threshold;
};

/* lb_nodes (LPM trie): outer sources that are LB nodes, or their declared
 * ipip prefixes. prefix_len counts from the start of the 16-byte address. */
struct lb_node_key {
	__u32 prefix_len;
	struct addr address;
};

/* fragments (LRU): the ports of a datagram whose first fragment was seen,
 * keyed as the datagram travelled when it was seen. Good for FRAGMENT_NS. */
struct fragment_key {
	struct addr src;
	struct addr dst;
	__be32 id;
	__u8 proto;
	__u8 pad[3];
};

struct fragment {
	__u64 seen; /* coarse boot-time clock, ns */
	__be16 src_port;
	__be16 dst_port;
	__u32 pad;
};

#define FRAGMENT_NS (15ULL * 1000000000ULL)

/* ---- The tunnel option ------------------------------------------------- */

/*
 * Geneve (RFC 8926): version 0, protocol type 0x0800 or 0x86DD, VNI names the
 * shard, and exactly one option of class OPTION_CLASS (from the experimental
 * range) and type OPTION_TYPE (critical bit set). Its data is this structure
 * followed by the target's address: 4 bytes, or 16 when option.address_len
 * says so.
 */
#define OPTION_CLASS 0xff4c
#define OPTION_TYPE 0x81
#define OPTION_VERSION 1

enum verb {
	VERB_DELIVER = 1, /* an order */
	VERB_ASK = 2,	  /* a question */
	VERB_DENIED = 3,  /* its bounce */
};

struct tunnel_option {
	__u8 version;
	__u8 verb; /* enum verb */
	__u8 attempt;
	__u8 address_len; /* 4 or 16 */
	__be16 port;	  /* of the target Pod */
	__u16 pad;
	__be32 backend;	   /* the LB node's own number for the target */
	__be32 generation; /* and that number's generation */
	__u8 tag[8];	   /* of the worker, as in its file */
	__u8 hash[8];	   /* of the flow, big-endian */
};

/* ---- Constants set at load --------------------------------------------- */

/* `volatile const struct config config`: the verifier drops dead branches. */
struct config {
	__u64 key[2];	   /* of the flow hash, two little-endian words */
	struct addr node4; /* this node's tunnel addresses; zero: none */
	struct addr node6;
	struct addr ipip4;	/* the declared source prefixes for ipip; */
	struct addr ipip6;	/* the node's address when none is declared */
	struct addr ipip4_mask; /* set bits vary with the flow; zero: none */
	struct addr ipip6_mask;
	__u8 tag[8]; /* this worker's own */
	__u32 vni;
	__be16 geneve_port;
	__u16 mss4; /* at most, in SYN-ACKs of Pods, for IPv4; 0: no clamp */
	__u16 mss6;
	__u8 lb;      /* role lb */
	__u8 backend; /* role backend */
	__u8 tracing; /* count and record nothing; write `traces` */
	__u8 pad[3];
	__u32 budget_floor; /* see struct budget */
	__u32 pad1;
	__u64 idle_tcp_ns;		     /* established TCP */
	__u64 idle_udp_ns;		     /* answered UDP */
	__u64 idle_closing_ns;		     /* closing TCP */
	struct addr nat4[NAT_ADDRESSES_MAX]; /* local addresses of mode nat */
	struct addr nat6[NAT_ADDRESSES_MAX];
	__u16 nat_first; /* of the local ports, */
	__u16 nat_ports; /* and how many; 0: no mode nat */
	__u8 nat4_count;
	__u8 nat6_count;
	__u8 cookies; /* any Pod of this node has an entry in floods */
	__u8 pad2;
};

/* traces[0], written only when config.tracing: what was decided and by what. */
struct trace {
	struct addr src;
	struct addr dst;
	__be16 src_port;
	__be16 dst_port;
	__u8 proto;
	__u8 family;   /* 4, 6, or 0: not IP */
	__u8 flags;    /* PACKET_* */
	__u8 tunnel;   /* enum mode of the tunnel that it came in, or 0 */
	__u32 service; /* number, or 0 */
	__u32 slot;    /* index within the service */
	__u64 hash;
	__u64 slot_word;
	__u32 backend;	 /* number, or 0 */
	__u32 next_hop;	 /* row, or 0 */
	__u32 ifindex;	 /* it leaves by, or 0 */
	__u16 verdict;	 /* enum verdict */
	__u16 drop;	 /* enum drop */
	struct addr pod; /* VERDICT_DELIVER: the Pod */
	__be16 pod_port;
	__u8 flow_state; /* of the entry used or made; 0: none */
	__u8 steps;	 /* TRACE_* reached, in no order */
	__u8 verb;	 /* enum verb of what was sent, or 0 */
	__u8 attempt;
	__u16 pad;
};

enum trace_step {
	TRACE_PARSED = 1 << 0,
	TRACE_SERVICE = 1 << 1,
	TRACE_SLOT = 1 << 2,
	TRACE_BACKEND = 1 << 3,
	TRACE_NEXT_HOP = 1 << 4,
	TRACE_DECAPSULATED = 1 << 5,
	TRACE_FLOW = 1 << 6,
	TRACE_STAND_IN = 1 << 7,
};

enum packet_flag {
	PACKET_FIRST_FRAGMENT = 1 << 0,
	PACKET_LATER_FRAGMENT = 1 << 1,
	PACKET_SYN = 1 << 2,	    /* TCP SYN without ACK */
	PACKET_ICMP_ERROR = 1 << 3, /* addresses and ports are those of the flow it is about */
	PACKET_ECHO = 1 << 4,	    /* ICMP or ICMPv6 echo request */
	PACKET_BOUNCED = 1 << 5,    /* came back from a backend's node */
};
