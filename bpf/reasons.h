/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* The part of fairlead.h that says what was decided, and counts it. */
#pragma once

#include <linux/types.h>

/* What was decided, apart from XDP's and tc's return codes. */
enum verdict {
	VERDICT_PASS = 1,    /* not ours: up the stack, untouched */
	VERDICT_FORWARD = 2, /* to a backend's node, through a tunnel */
	VERDICT_DELIVER = 3, /* to a Pod of this node, up the stack */
	VERDICT_ANSWER = 4,  /* to the client: a Pod's answer, as the VIP */
	VERDICT_REPLY = 5,   /* to the sender, made by us: echo, ICMP error */
	VERDICT_DROP = 6,    /* see enum drop */
	VERDICT_DENY = 7,    /* back to the LB node: no such flow or Pod here */
};

/* Every drop has a reason and a counter: drops[reason]. */
enum drop {
	DROP_NONE = 0,
	/* Any packet to a VIP. */
	DROP_MALFORMED = 1,	    /* truncated or self-contradicting headers */
	DROP_EXTENSION_HEADERS = 2, /* more IPv6 extension headers than we walk */
	DROP_NO_SERVICE = 3,	    /* a VIP, but no service at this port and protocol */
	DROP_PROTOCOL = 4,	    /* a VIP, but neither TCP, UDP nor an ICMP that we handle */
	DROP_NO_BACKEND = 5,	    /* the service has no backend that can take it */
	DROP_FRAGMENT_UNKNOWN = 6,  /* a later fragment whose first was not seen */
	DROP_ICMP_UNRELATED = 7,    /* an ICMP error about no flow of ours */
	DROP_TTL = 8,		    /* TTL or hop limit used up, and no reply possible */
	DROP_TOO_BIG = 9,	    /* does not fit the tunnel, and no reply possible */
	DROP_NO_NEXT_HOP = 10,	    /* neither resolved nor known to the kernel's FIB */
	DROP_HEADROOM = 11,	    /* the driver gave no room for the outer headers */
	DROP_UNOWNED = 12,	    /* no backend has the TCP flow, since less than 3 s */
	DROP_BUDGET = 13,	    /* too many questions of one service and client prefix */
	DROP_SOURCE_RANGE = 14,	    /* the client is in none of the service's source ranges */
	DROP_LIMIT_SERVICE = 15,    /* more than the service may have */
	DROP_LIMIT_CLIENT = 16,	    /* more than one client of the service may have */
	DROP_NAT_PORTS = 17,	    /* all local ports that a new flow may have are taken */
	DROP_NAT_UNKNOWN = 18,	    /* a TCP packet of no connection of this node's */
	DROP_NAT_FULL = 19,	    /* the table of flows of mode nat is full */
	/* Tunnel packets to this node. */
	DROP_TUNNEL_SOURCE = 20, /* outer source is no LB node of the shard */
	DROP_TUNNEL_FORMAT = 21, /* Geneve or option not as we send it */
	DROP_TUNNEL_VNI = 22,	 /* of another shard */
	DROP_TUNNEL_TAG = 23,	 /* not this worker's tag */
	DROP_TUNNEL_VIP = 24,	 /* inner destination is no VIP that a Pod here serves */
	DROP_TUNNEL_POD = 25,	 /* the named Pod is not of this node, or not of this VIP */
	DROP_TUNNEL_BOUNCE = 26, /* a bounce that answers no question of this node */
	DROP_TUNNEL_ECN = 28,	 /* outer CE over an inner packet that is not ECN-capable */
	/* Flows at the backend's node. */
	DROP_FLOWS_FULL = 40,	   /* the table of flows is full */
	DROP_FLOW_CONFLICT = 41,   /* the Pod's tuple belongs to another VIP's flow */
	DROP_FROM_POD_TUNNEL = 42, /* a Pod sent tunnel traffic */
	DROP_COOKIE = 43,	   /* a SYN cookie that cannot be sent */
	DROP_PROBE = 44,	   /* a health check's packet has no way to its backend */
	DROP_MAX = 64,
};

/* events[event]: what is worth counting and is not a drop. */
enum event {
	EVENT_NONE = 0,
	EVENT_ECHO_REPLY = 1,
	EVENT_TOO_BIG = 2,	  /* Packet Too Big / Fragmentation Needed sent */
	EVENT_TIME_EXCEEDED = 3,  /* Time Exceeded sent */
	EVENT_FIB_LOOKUP = 4,	  /* next hop unresolved: the kernel's FIB was asked */
	EVENT_STAND_IN = 5,	  /* a following slot's backend stood in for one gone */
	EVENT_FLOW_NEW = 6,	  /* entry made in pending */
	EVENT_FLOW_CONFIRMED = 7, /* moved from pending to flows */
	EVENT_FLOW_CLOSED = 8,
	EVENT_FLOW_EXPIRED = 9,
	EVENT_MSS_CLAMPED = 10,
	EVENT_ANSWER = 11,	    /* a Pod's packet translated to the VIP */
	EVENT_DELIVERED = 12,	    /* a packet given to a Pod of this node */
	EVENT_DENIED = 13,	    /* a question or an order sent back: no such flow or Pod here */
	EVENT_BOUNCE = 14,	    /* a packet that came back: the next attempt was made */
	EVENT_HINT = 15,	    /* a contested flow went to where its hint says */
	EVENT_TAKEN = 16,	    /* a flow that nobody has was ordered to the slot's backend */
	EVENT_NAT_NEW = 17,	    /* a flow of mode nat begun */
	EVENT_NAT_RETRY = 18,	    /* a local port was taken, and another tried */
	EVENT_AFFINITY = 20,	    /* a new flow went to the Pod that its client had already */
	EVENT_AFFINITIES_FULL = 21, /* a client's Pod could not be noted: the table is full */
	EVENT_PROBE = 22,	    /* a health check's packet sent through the tunnel */
	EVENT_COOKIE_SENT = 23,	    /* a SYN answered with a cookie */
	EVENT_COOKIE_ACCEPTED = 24, /* a connection that answered one */
	EVENT_MAX = 32,
};

/* service_counters[number] and backend_counters[number], per CPU. */
struct counter {
	__u64 packets;
	__u64 bytes;	   /* L3 bytes as the client sent them */
	__u64 connections; /* TCP SYNs */
};
