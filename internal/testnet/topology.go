// SPDX-License-Identifier: Apache-2.0

package testnet

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"

	"github.com/vishvananda/netlink"
)

var (
	gateway4 = netip.MustParseAddr("169.254.1.1") // answered by proxy ARP
	gateway6 = netip.MustParseAddr("fe80::1")
	default4 = netip.MustParsePrefix("0.0.0.0/0")
	default6 = netip.MustParsePrefix("::/0")
)

// quiet makes addresses usable at once and keeps hosts from configuring
// themselves.
var quiet = map[string]string{
	"ipv6/conf/all/accept_dad":     "0",
	"ipv6/conf/default/accept_dad": "0",
	"ipv6/conf/all/accept_ra":      "0",
	"ipv6/conf/default/accept_ra":  "0",
}

var forwarding = map[string]string{
	"ipv4/ip_forward":          "1",
	"ipv6/conf/all/forwarding": "1",
}

// namespace makes a namespace of this network.
func (n *Network) namespace(name string, settings ...map[string]string) (*Namespace, error) {
	ns, err := newNamespace(name)
	if err != nil {
		return nil, err
	}
	n.all = append(n.all, ns)
	all := maps.Clone(quiet)
	for _, s := range settings {
		maps.Copy(all, s)
	}
	if err := ns.Sysctl(all); err != nil {
		return nil, err
	}
	lo, err := ns.Netlink.LinkByName("lo")
	if err != nil {
		return nil, fmt.Errorf("find lo in %s: %w", name, err)
	}
	if err := ns.Netlink.LinkSetUp(lo); err != nil {
		return nil, fmt.Errorf("set up lo in %s: %w", name, err)
	}
	return ns, nil
}

func (n *Network) build(cfg Config) error {
	var err error
	n.Router, err = n.namespace("router", forwarding, map[string]string{
		// Answers come from where the VIPs are not routed to.
		"ipv4/conf/all/rp_filter":        "0",
		"ipv4/conf/default/rp_filter":    "0",
		"ipv4/fib_multipath_hash_policy": "1",
		"ipv6/fib_multipath_hash_policy": "1",
		"ipv4/icmp_ratelimit":            "0",
		"ipv6/icmp/ratelimit":            "0",
	})
	if err != nil {
		return err
	}
	if n.Client, err = n.host("client", Client4, Client6); err != nil {
		return err
	}
	if n.Stranger, err = n.host("stranger", Stranger4, Stranger6); err != nil {
		return err
	}
	if cfg.LAN {
		if err := n.addLAN(cfg.MTU); err != nil {
			return err
		}
	}
	for i, spec := range cfg.Nodes {
		if spec.MTU == 0 {
			spec.MTU = cfg.MTU
		}
		if err := n.node(i+1, spec); err != nil {
			return err
		}
	}
	return n.spread()
}

// host makes a namespace with one address of each family behind the router.
func (n *Network) host(name string, v4, v6 netip.Addr) (*Namespace, error) {
	ns, err := n.namespace(name)
	if err != nil {
		return nil, err
	}
	return ns, n.attach(ns, "to-"+name, v4, v6, 1500)
}

// lan is the bridge on the router that connects the nodes of a LAN.
const lan = "lan"

// addressOf are a node's addresses: in a subnet with the router alone, or in
// the LAN.
func (n *Network) addressOf(number int) (v4, v6 netip.Addr) {
	if n.lan {
		return netip.AddrFrom4([4]byte{10, 0, 250, byte(number + 1)}), netip.MustParseAddr(fmt.Sprintf("fd00:0:0:250::%x", number+1))
	}
	return netip.AddrFrom4([4]byte{10, 0, byte(number), 2}), netip.MustParseAddr(fmt.Sprintf("fd00:0:0:%x::2", number))
}

func (n *Network) addLAN(mtu int) error {
	n.lan = true
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = lan, mtu
	if err := n.Router.Netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
		return fmt.Errorf("add bridge %s: %w", lan, err)
	}
	v4, v6 := n.addressOf(0)
	return end{n.Router, lan, []netip.Prefix{netip.PrefixFrom(v4, 24), netip.PrefixFrom(v6, 64)}}.configure()
}

// attachToLAN is attach for a node of a LAN.
func (n *Network) attachToLAN(ns *Namespace, device string, v4, v6 netip.Addr, mtu int) error {
	if err := connect(end{ns: n.Router, device: device}, end{ns, Uplink, []netip.Prefix{netip.PrefixFrom(v4, 24), netip.PrefixFrom(v6, 64)}}, mtu); err != nil {
		return err
	}
	port, err := n.Router.Netlink.LinkByName(device)
	if err != nil {
		return fmt.Errorf("find device %s: %w", device, err)
	}
	bridge, err := n.Router.Netlink.LinkByName(lan)
	if err != nil {
		return fmt.Errorf("find bridge %s: %w", lan, err)
	}
	if err := n.Router.Netlink.LinkSetMaster(port, bridge); err != nil {
		return fmt.Errorf("put %s into %s: %w", device, lan, err)
	}
	router4, router6 := n.addressOf(0)
	return errors.Join(ns.SetRoute(Route{To: default4, Via: []netip.Addr{router4}}), ns.SetRoute(Route{To: default6, Via: []netip.Addr{router6}}))
}

// attach connects a namespace's uplink to the router, which gets the address
// before the namespace's own, and makes the router its gateway.
func (n *Network) attach(ns *Namespace, device string, v4, v6 netip.Addr, mtu int) error {
	router := end{n.Router, device, []netip.Prefix{
		netip.PrefixFrom(v4.Prev(), 24), netip.PrefixFrom(v6.Prev(), 64)}}
	host := end{ns, Uplink, []netip.Prefix{
		netip.PrefixFrom(v4, 24), netip.PrefixFrom(v6, 64)}}
	if err := connect(router, host, mtu); err != nil {
		return err
	}
	for _, r := range []Route{
		{To: default4, Via: []netip.Addr{v4.Prev()}},
		{To: default6, Via: []netip.Addr{v6.Prev()}},
	} {
		if err := ns.SetRoute(r); err != nil {
			return err
		}
	}
	return nil
}

func (n *Network) node(number int, spec NodeSpec) error {
	// Strict, as most distributions have it: direct return must not need less.
	ns, err := n.namespace(spec.Name, forwarding, map[string]string{
		"ipv4/conf/all/rp_filter":     "1",
		"ipv4/conf/default/rp_filter": "1",
	})
	if err != nil {
		return err
	}
	node := &Node{
		Namespace: ns, NodeSpec: spec, net: n,
		Link: "to-" + spec.Name,
	}
	node.Address4, node.Address6 = n.addressOf(number)
	n.Nodes = append(n.Nodes, node)
	attach := n.attach
	if n.lan {
		attach = n.attachToLAN
	}
	if err := attach(ns, node.Link, node.Address4, node.Address6, spec.MTU); err != nil {
		return err
	}
	if err := n.Router.sendWhole(node.Link); err != nil {
		return err
	}
	if err := ns.sendWhole(Uplink); err != nil {
		return err
	}
	if spec.VLAN != 0 {
		if err := n.Router.tagInFrame(node.Link); err != nil {
			return err
		}
	}
	for i := range spec.Pods {
		if err := node.addPod(number, i); err != nil {
			return err
		}
	}
	if spec.Pods == 0 {
		return nil
	}
	for _, r := range []Route{
		{To: node.PodSubnet4(), Via: []netip.Addr{node.Address4}},
		{To: node.PodSubnet6(), Via: []netip.Addr{node.Address6}},
	} {
		if err := n.Router.SetRoute(r); err != nil {
			return err
		}
	}
	return nil
}

// PodSubnet4 and PodSubnet6 hold the addresses of the node's Pods.
func (n *Node) PodSubnet4() netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 244, n.Address4.As4()[2], 0}), 24)
}

// PodSubnet6 is the IPv6 one.
func (n *Node) PodSubnet6() netip.Prefix {
	return netip.MustParsePrefix(fmt.Sprintf("fd00:244:0:%x::/64", n.Address4.As4()[2]))
}

// addPod makes a Pod with /32 and /128 addresses, whose gateway is no address
// of the node: the node's end of the veth answers for it.
func (n *Node) addPod(number, index int) error {
	letter := string(rune('a' + index))
	name := fmt.Sprintf("%s-%s", n.Name(), letter)
	ns, err := n.net.namespace(name)
	if err != nil {
		return err
	}
	pod := &Pod{
		Namespace: ns, Node: n,
		Address4: netip.AddrFrom4([4]byte{10, 244, byte(number), byte(index + 2)}),
		Address6: netip.MustParseAddr(fmt.Sprintf("fd00:244:0:%x::%x", number, index+2)),
	}
	n.Pods = append(n.Pods, pod)
	host := "pod-" + letter
	err = connect(
		end{n.Namespace, host, []netip.Prefix{netip.PrefixFrom(gateway6, 64)}},
		end{ns, Uplink, []netip.Prefix{
			netip.PrefixFrom(pod.Address4, 32), netip.PrefixFrom(pod.Address6, 128)}},
		n.MTU)
	if err != nil {
		return err
	}
	if err := n.Sysctl(map[string]string{
		"ipv4/conf/" + host + "/proxy_arp":    "1",
		"ipv4/neigh/" + host + "/proxy_delay": "0",
	}); err != nil {
		return err
	}
	if err := ns.SetRoute(Route{To: netip.PrefixFrom(gateway4, 32), Device: Uplink}); err != nil {
		return err
	}
	for _, r := range []Route{
		{To: default4, Via: []netip.Addr{gateway4}, Device: Uplink},
		{To: default6, Via: []netip.Addr{gateway6}, Device: Uplink},
	} {
		if err := ns.SetRoute(r); err != nil {
			return err
		}
	}
	for _, a := range []netip.Addr{pod.Address4, pod.Address6} {
		to := netip.PrefixFrom(a, a.BitLen())
		if err := n.SetRoute(Route{To: to, Device: host}); err != nil {
			return err
		}
	}
	return nil
}

// spread routes the VIPs to all LB nodes.
func (n *Network) spread() error { return n.SpreadOver(n.LoadBalancers()...) }

// SpreadOver routes the VIPs to these LB nodes alone, as when the router has
// lost the others.
func (n *Network) SpreadOver(nodes ...*Node) error {
	var via4, via6 []netip.Addr
	for _, node := range nodes {
		via4 = append(via4, node.Address4)
		via6 = append(via6, node.Address6)
	}
	if len(via4) == 0 {
		return nil
	}
	if err := n.Router.SetRoute(Route{To: Pool4, Via: via4}); err != nil {
		return err
	}
	return n.Router.SetRoute(Route{To: Pool6, Via: via6})
}
