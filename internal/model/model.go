// SPDX-License-Identifier: Apache-2.0

// Package model is the packet path in plain Go: what the BPF programs must
// decide about each packet. It is written to be read and compared with, not to
// be fast.
package model

import (
	"net/netip"
	"time"

	"fairlead.dev/fairlead/internal/flowhash"
)

// Protocols and the offsets that matter.
const (
	TCP      = 6
	UDP      = 17
	icmp4    = 1
	ipv4     = 4
	ipv6     = 41
	icmp6    = 58
	hopopts  = 0
	routing  = 43
	fragment = 44
	dstopts  = 60

	etherIPv4 = 0x0800
	etherIPv6 = 0x86dd
	etherVLAN = 0x8100
	etherQinQ = 0x88a8

	// Headers end below this offset, or are not read.
	offsetMax     = 0x3ff
	vlanTagsMax   = 2
	extensionsMax = 6
	standInsMax   = 8

	fragmentAge = 15 * time.Second
	pendingAge  = 60 * time.Second
)

// Verdict is what becomes of a packet.
type Verdict string

// The verdicts, named as in bpf/fairlead.h.
const (
	Pass    Verdict = "pass"
	Forward Verdict = "forward"
	Deliver Verdict = "deliver"
	Reply   Verdict = "reply"
	Deny    Verdict = "deny"
	Drop    Verdict = "drop"
)

// Reason is why a packet is dropped, named as in bpf/fairlead.h without the
// prefix and in lower case; "" is none.
type Reason string

// The reasons.
const (
	malformed        Reason = "malformed"
	extensionHeaders Reason = "extension_headers"
	noService        Reason = "no_service"
	wrongProtocol    Reason = "protocol"
	noBackend        Reason = "no_backend"
	fragmentUnknown  Reason = "fragment_unknown"
	icmpUnrelated    Reason = "icmp_unrelated"
	ttl              Reason = "ttl"
	tooBig           Reason = "too_big"
	noNextHop        Reason = "no_next_hop"
	tunnelSource     Reason = "tunnel_source"
	tunnelFormat     Reason = "tunnel_format"
	tunnelVNI        Reason = "tunnel_vni"
	tunnelTag        Reason = "tunnel_tag"
	tunnelVIP        Reason = "tunnel_vip"
	tunnelPod        Reason = "tunnel_pod"
	unownedFlow      Reason = "unowned"
	tunnelBounce     Reason = "tunnel_bounce"
	tunnelECN        Reason = "tunnel_ecn"
	flowConflict     Reason = "flow_conflict"
	sourceRange      Reason = "source_range"

	// notIP is no reason to drop anything: the frame is nobody's concern.
	notIP Reason = "not ip"
)

// Decision is what was decided about one packet, and by what. What was not
// reached is zero.
type Decision struct {
	Verdict Verdict
	Reason  Reason // of Drop
	Hash    uint64 // of the flow
	Service uint32 // number
	Slot    uint32 // within the service
	Backend uint32 // number
	Verb    uint8  // of Forward
	Attempt uint8
	Pod     netip.AddrPort // of Deliver
}

// Node is one node with either role or both: what it was told, and what it
// remembers.
type Node struct {
	LB, Backend  bool
	Key          flowhash.Key
	Node4, Node6 netip.Addr // own tunnel addresses
	VNI          uint32
	GenevePort   uint16
	Tag          [8]byte

	// What an LB node was told.
	VIPs     map[netip.Addr]bool
	Services map[Front]Service
	Backends map[uint32]Backend // by number; not there: gone

	// What a backend's node was told: the LB nodes' prefixes, and what each
	// {Pod, port, protocol} serves.
	LBNodes []netip.Prefix
	Pods    map[Target][]netip.AddrPort
	// Affinity is how long a Pod keeps the clients of what it serves; not there:
	// not at all.
	Affinity map[Target]map[netip.AddrPort]time.Duration

	fragments   map[fragmentKey]fragmentPorts
	hints, syns map[uint64]hint
	denials     map[uint16]denial
	Flows       Flows
}

// Front is where clients connect.
type Front struct {
	Address netip.AddrPort
	Proto   uint8
}

// Target is a Pod's address, port and protocol; a server that holds the VIP
// has the VIP and its port.
type Target Front

// Service is a service's number and the backend of each of its slots: a power
// of two of them, or none. A slot with candidates is contested.
type Service struct {
	Number      uint32
	Slots       []uint32
	Candidates  map[uint32][]uint32 // by slot, newest first
	Independent bool                // datagrams are never questions
	Orders      bool                // there is nobody to ask
	Affinity    bool                // the slot is of the client's address alone
	Ranges      []netip.Prefix      // of the clients that may come; nil: all
}

// Backend is a backend that can be given packets.
type Backend struct {
	Mode   Mode
	Target netip.AddrPort
	Outer  int  // bytes of the outer headers
	MTU    int  // of the way to its node; 0: no next hop
	Active bool // takes new flows
	Usable bool // active or draining
	Owns   bool // Usable, or failing: may own TCP flows

	// Who may send its denials: the node, its tag, and the incarnation.
	Tunnel     netip.Addr
	Tag        [8]byte
	Generation uint32
}

// Mode is how packets reach a backend.
type Mode uint8

// The modes.
const (
	Geneve Mode = iota + 1
	IPIP
	Local
	L2
)

// Receive decides about a frame that came in, at a time since the beginning.
func (n *Node) Receive(frame []byte, now time.Duration) Decision {
	p, reason := parseAddresses(frame)
	if reason != "" {
		return Decision{Verdict: Pass}
	}
	if outer, ok := n.tunnelHere(frame, p); ok {
		return n.unwrap(frame, outer, now)
	}
	if n.LB && n.VIPs[p.dst.Addr()] {
		return n.balance(frame, p, now)
	}
	return Decision{Verdict: Pass}
}

func dropped(d Decision, reason Reason) Decision {
	d.Verdict, d.Reason = Drop, reason
	return d
}
