// SPDX-License-Identifier: Apache-2.0

package testnet

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Watch counts, on the router, what passes between it and each node.
type Watch struct {
	sights *ebpf.Map
	closes []func() error
}

// Sight is what was seen of a node: packets by kind and direction.
type Sight struct {
	RequestsTo, RequestsFrom uint64 // TCP or UDP to a VIP
	AnswersTo, AnswersFrom   uint64 // TCP or UDP from a VIP
	TunnelTo, TunnelFrom     uint64
	ICMPTo, ICMPFrom         uint64 // to or from a VIP
}

func newWatch(n *Network) (*Watch, error) {
	w := &Watch{}
	for _, node := range n.Nodes {
		if err := w.add(n, node); err != nil {
			w.close()
			return nil, fmt.Errorf("watch the link to %s: %w", node.Name(), err)
		}
	}
	return w, nil
}

// add loads the programs for one node's link; all share the map of sights.
func (w *Watch) add(n *Network, node *Node) error {
	spec, err := loadBpf()
	if err != nil {
		return err
	}
	if err := errors.Join(
		spec.Variables[bpfVarTunnelPort].Set(uint16(GenevePort)),
		spec.Variables[bpfVarVlan].Set(node.VLAN)); err != nil {
		return err
	}
	var options ebpf.CollectionOptions
	if w.sights != nil {
		options.MapReplacements = map[string]*ebpf.Map{bpfMapSights: w.sights}
	}
	var objects bpfObjects
	if err := spec.LoadAndAssign(&objects, &options); err != nil {
		return err
	}
	w.closes = append(w.closes, objects.Close)
	if w.sights == nil {
		w.sights = objects.Sights
	}
	for _, p := range []netip.Prefix{Pool4, Pool6} {
		if err := objects.Vips.Put(lpmKey(p), uint32(1)); err != nil {
			return err
		}
	}
	index, err := n.Router.Device(node.Link)
	if err != nil {
		return err
	}
	err = n.Router.Do(func() error {
		l, err := link.AttachXDP(link.XDPOptions{Program: objects.FromNode, Interface: index})
		if err == nil {
			w.closes = append(w.closes, l.Close)
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("attach xdp: %w", err)
	}
	if err := n.Router.attachTC(node.Link, netlink.HANDLE_MIN_EGRESS, objects.ToNode); err != nil {
		return err
	}
	if node.VLAN == 0 {
		return nil
	}
	return node.attachTC(Uplink, netlink.HANDLE_MIN_INGRESS, objects.Untag)
}

func (n *Namespace) attachTC(device string, parent uint32, program *ebpf.Program) error {
	index, err := n.Device(device)
	if err != nil {
		return err
	}
	clsact := &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}}
	if err := n.Netlink.QdiscReplace(clsact); err != nil {
		return fmt.Errorf("add clsact: %w", err)
	}
	filter := &netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{LinkIndex: index, Parent: parent,
			Handle: 1, Priority: 1, Protocol: unix.ETH_P_ALL},
		Fd: program.FD(), Name: "testnet", DirectAction: true,
	}
	if err := n.Netlink.FilterReplace(filter); err != nil {
		return fmt.Errorf("attach tc: %w", err)
	}
	return nil
}

func lpmKey(p netip.Prefix) bpfVipKey {
	key := bpfVipKey{PrefixLen: uint32(128 - p.Addr().BitLen() + p.Bits())}
	bytes := p.Addr().As16()
	for i := range key.Address {
		key.Address[i] = binary.NativeEndian.Uint32(bytes[i*4:])
	}
	return key
}

// See returns what was seen of a node since the network began.
func (w *Watch) See(n *Node) (Sight, error) {
	index, err := n.net.Router.Device(n.Link)
	if err != nil {
		return Sight{}, err
	}
	count := func(d bpfDirection, s bpfSight) uint64 {
		var perCPU []uint64
		key := bpfSightKey{Ifindex: uint32(index), Direction: uint32(d), Sight: uint32(s)}
		if w.sights.Lookup(key, &perCPU) != nil {
			return 0
		}
		var sum uint64
		for _, v := range perCPU {
			sum += v
		}
		return sum
	}
	const to, from = bpfDirectionTO_NODE, bpfDirectionFROM_NODE
	return Sight{
		RequestsTo: count(to, bpfSightSIGHT_REQUEST), RequestsFrom: count(from, bpfSightSIGHT_REQUEST),
		AnswersTo: count(to, bpfSightSIGHT_ANSWER), AnswersFrom: count(from, bpfSightSIGHT_ANSWER),
		TunnelTo: count(to, bpfSightSIGHT_TUNNEL), TunnelFrom: count(from, bpfSightSIGHT_TUNNEL),
		ICMPTo: count(to, bpfSightSIGHT_ICMP), ICMPFrom: count(from, bpfSightSIGHT_ICMP),
	}, nil
}

func (w *Watch) close() {
	for i := len(w.closes) - 1; i >= 0; i-- {
		_ = w.closes[i]()
	}
}
