// SPDX-License-Identifier: Apache-2.0

package testnet

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Pair is two namespaces and one veth pair between them, for measuring: its
// ends are both called Uplink.
type Pair struct {
	Outside, Inside *Namespace
	net             Network
}

// NewPair makes a Pair whose ends have these addresses, in one subnet each.
// The inner one forwards.
func NewPair(outside, inside []netip.Prefix) (_ *Pair, err error) {
	p := &Pair{}
	defer func() {
		if err != nil {
			p.Close()
		}
	}()
	if p.Outside, err = p.net.namespace("outside"); err != nil {
		return nil, err
	}
	if p.Inside, err = p.net.namespace("inside", forwarding); err != nil {
		return nil, err
	}
	return p, connect(end{p.Outside, Uplink, outside}, end{p.Inside, Uplink, inside}, 1500)
}

// Close removes the pair.
func (p *Pair) Close() { p.net.Close() }

// SetNeighbour makes the other end of a namespace's uplink the way to an
// address, for ever.
func (n *Namespace) SetNeighbour(a netip.Addr, mac net.HardwareAddr) error {
	index, err := n.Device(Uplink)
	if err != nil {
		return err
	}
	neighbour := &netlink.Neigh{LinkIndex: index, IP: a.AsSlice(), HardwareAddr: mac, State: unix.NUD_PERMANENT}
	if err := n.Netlink.NeighSet(neighbour); err != nil {
		return fmt.Errorf("set neighbour %s in %s: %w", a, n.Label, err)
	}
	return nil
}

// MAC returns the address of a namespace's uplink.
func (n *Namespace) MAC() (net.HardwareAddr, error) {
	link, err := n.Netlink.LinkByName(Uplink)
	if err != nil {
		return nil, fmt.Errorf("find %s in %s: %w", Uplink, n.Label, err)
	}
	return link.Attrs().HardwareAddr, nil
}
