// SPDX-License-Identifier: Apache-2.0

package status

// Explanation is what a drop reason means, and what to do about it.
type Explanation struct{ Means, Remedy string }

// Explanations are those of all drop reasons, by name.
var Explanations = map[string]Explanation{
	"malformed":         {"truncated or self-contradicting headers", "look at the sender; capture with tcpdump on the uplink"},
	"extension_headers": {"more than 6 IPv6 extension headers, or a routing header that is not used up", "none is needed: such packets are hostile or a mistake"},
	"no_service":        {"for a VIP, but no Service has this port and protocol", "compare the Service's ports with what clients use"},
	"protocol":          {"for a VIP, but neither TCP, UDP, an echo request nor an ICMP error", "none is needed unless clients use another protocol, which is not balanced"},
	"no_backend":        {"the Service has no backend that can take the packet", "see its endpoints in `fairlead status`: none ready, or none reachable"},
	"fragment_unknown":  {"a later fragment whose first fragment was not seen, or too long ago", "let routers hash fragments by addresses alone; lower the senders' MTU"},
	"icmp_unrelated":    {"an ICMP error about no flow of a Service", "none is needed: it is late, or forged"},
	"ttl":               {"TTL used up, and its sender must not be answered", "look for a routing loop"},
	"too_big":           {"does not fit the tunnel, and its sender must not be answered", "raise the underlay's MTU by 108 bytes over the clients'"},
	"no_next_hop":       {"neither we nor the kernel know a way to the backend's node", "see the unresolved next hops in `fairlead status`; check routes and neighbours"},
	"headroom":          {"the driver left no room for the outer headers", "use a driver with 256 bytes of XDP headroom"},
	"unowned":           {"no backend has the TCP flow; for 3 s its packets are dropped, since its owner may not be known here yet", "none is needed if rare: it ended, or its backend has gone; if many, compare what the nodes see"},
	"budget":            {"more questions of one Service and client prefix than a fifth of its packets and 4096 a second", "none is needed: the client floods with packets of no flow"},
	"source_range":      {"the client is in none of the Service's source ranges", "add it to spec.loadBalancerSourceRanges, if it may come"},
	"limit_service":     {"more than the Service's limits allow, of all its clients", "raise spec.limits of its ServicePolicy, or look for who sends so much"},
	"limit_client":      {"more than the Service's limits allow one client", "raise spec.limits.perClient of its ServicePolicy, if the client may send so much"},
	"nat_ports":         {"a new flow of mode NAT, and all local ports that it may have with its backend are taken", "add natAddresses to the Node, widen the agent's nat.ports, or shorten the timeouts"},
	"nat_unknown":       {"a TCP packet of mode NAT that belongs to no connection of this LB node", "none is needed if rare: the connection is over, or was another LB node's"},
	"nat_full":          {"the table of flows of mode NAT is full", "raise limits.natFlows, or shorten the timeouts"},
	"tunnel_source":     {"a tunnel packet from an address that is no LB node's", "if it is one of ours, add the address to its Node; else someone forges"},
	"tunnel_format":     {"a tunnel packet that is not as LB nodes send them", "upgrade nodes to the same version; else someone forges"},
	"tunnel_vni":        {"a tunnel packet of another shard", "give all nodes of a shard the same geneve.vni"},
	"tunnel_tag":        {"a tunnel packet with a wrong tag", "give this node the tag that `fairlead keys` made for it from the shard's secret"},
	"tunnel_vip":        {"a tunnel packet to an address or port that the named Pod does not serve", "wait for nodes to see the same objects; else someone forges"},
	"tunnel_pod":        {"a tunnel packet that cannot be sent back, for a Pod that is not on this node", "correct the node's podSubnets; it is normal for a moment after a Pod has gone"},
	"tunnel_bounce":     {"a packet sent back that this node did not ask about", "none is needed if rare: its backend has been replaced meanwhile; else someone forges"},
	"tunnel_ecn":        {"congestion was marked on the tunnel of a packet that cannot carry the mark", "none is needed: RFC 6040 demands the drop"},
	"flows_full":        {"the table of flows is full; established flows stay", "raise limits.flows, or lower the timeouts"},
	"flow_conflict":     {"the client's address and port already speak to the Pod by another VIP", "none is needed: the client uses another port next time"},
	"cookie":            {"a SYN cookie that cannot be sent: no route or neighbour leads to the client", "check the node's routes"},
	"probe":             {"a health check's packet has no way to its backend: it was replaced, or no route leads to its node", "none is needed if rare; else check routes to the backend's node"},
	"from_pod_tunnel":   {"a Pod sent tunnel packets", "look at the Pod: it tries to forge"},
}
