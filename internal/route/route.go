// SPDX-License-Identifier: Apache-2.0

// Package route finds next hops (device, Ethernet addresses, VLAN, MTU) from
// the kernel's routes and neighbours, and tells when they may have changed.
package route

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"fairlead.dev/fairlead/internal/lb"
)

// ErrUnresolved says that the route is known but the neighbour does not have
// an Ethernet address yet. The kernel has been asked to find it.
var ErrUnresolved = errors.New("neighbour not resolved yet")

// neighboursFor is how long one dump of the neighbour table serves. A node
// resolves thousands of tunnel addresses in one go; a dump for each would be
// quadratic.
const neighboursFor = 20 * time.Millisecond

// usable are the states in which the kernel itself would use the address.
const usable = unix.NUD_REACHABLE | unix.NUD_STALE | unix.NUD_DELAY | unix.NUD_PROBE |
	unix.NUD_PERMANENT | unix.NUD_NOARP

type neighbourKey struct {
	link int
	addr netip.Addr
}

// Table answers from the network namespace that it was made in. It is safe
// for concurrent use.
type Table struct {
	uplinks []string
	kernel  *netlink.Handle

	mu         sync.Mutex
	dumped     time.Time
	neighbours map[neighbourKey]netlink.Neigh
}

// New returns a Table for the devices that carry XDP, by name.
func New(uplinks []string) (*Table, error) {
	kernel, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open netlink socket: %w", err)
	}
	return &Table{uplinks: slices.Clone(uplinks), kernel: kernel}, nil
}

// Close releases the netlink socket.
func (t *Table) Close() { t.kernel.Close() }

// Resolve returns how a packet to dst leaves this node. The error is
// ErrUnresolved while the neighbour is being looked for, and otherwise says
// what about the route makes it unusable.
func (t *Table) Resolve(dst netip.Addr) (lb.NextHop, error) {
	found, err := t.lookup(dst)
	if err != nil {
		return lb.NextHop{}, err
	}
	link, err := t.kernel.LinkByIndex(found.LinkIndex)
	if err != nil {
		return lb.NextHop{}, fmt.Errorf("find device %d of the route to %s: %w", found.LinkIndex, dst, err)
	}
	device, vlan, err := untagged(link, t.kernel.LinkByIndex)
	if err != nil {
		return lb.NextHop{}, err
	}
	hop := lb.NextHop{Interface: device.Attrs().Index, VLAN: vlan, MTU: mtu(found, link)}
	if !slices.Contains(t.uplinks, device.Attrs().Name) {
		return lb.NextHop{}, fmt.Errorf("the route to %s leaves by %s (%s), which carries no program of ours; add it to interfaces (now: %s)",
			dst, device.Attrs().Name, device.Type(), strings.Join(t.uplinks, ", "))
	}
	if !ethernet(link.Attrs().HardwareAddr, &hop.Source) {
		return lb.NextHop{}, fmt.Errorf("the route to %s leaves by %s, which is no Ethernet device", dst, link.Attrs().Name)
	}
	target, err := t.neighbour(found.LinkIndex, gateway(found, dst))
	if err != nil {
		return lb.NextHop{}, fmt.Errorf("next hop %s of %s on %s: %w", gateway(found, dst), dst, link.Attrs().Name, err)
	}
	hop.Target = target
	return hop, nil
}

// PodInterface returns the index of the device that this node reaches one of
// its own Pods by: the host's side of a veth, or a bridge.
func (t *Table) PodInterface(pod netip.Addr) (int, error) {
	found, err := t.lookup(pod)
	if err != nil {
		return 0, err
	}
	link, err := t.kernel.LinkByIndex(found.LinkIndex)
	if err != nil {
		return 0, fmt.Errorf("find device %d of the route to %s: %w", found.LinkIndex, pod, err)
	}
	if slices.Contains(t.uplinks, link.Attrs().Name) {
		return 0, fmt.Errorf("the route to Pod %s leaves by %s, so it is not on this node; correct podAddresses or podSubnets of the Node", pod, link.Attrs().Name)
	}
	return found.LinkIndex, nil
}

// lookup asks the kernel for its route to dst and refuses those that lead
// nowhere.
func (t *Table) lookup(dst netip.Addr) (netlink.Route, error) {
	found, err := t.kernel.RouteGet(dst.AsSlice())
	if err != nil {
		return netlink.Route{}, fmt.Errorf("look up the route to %s: %w", dst, err)
	}
	if len(found) == 0 {
		return netlink.Route{}, fmt.Errorf("look up the route to %s: the kernel has none", dst)
	}
	if found[0].Type == unix.RTN_LOCAL {
		return netlink.Route{}, fmt.Errorf("the route to %s: it is an address of this node", dst)
	}
	if found[0].Type != unix.RTN_UNICAST {
		return netlink.Route{}, fmt.Errorf("the route to %s is of kernel type %d, not unicast", dst, found[0].Type)
	}
	return found[0], nil
}

// untagged returns the device that frames of link really leave by, and the
// VLAN id that they carry there.
func untagged(link netlink.Link, byIndex func(int) (netlink.Link, error)) (netlink.Link, uint16, error) {
	vlan, ok := link.(*netlink.Vlan)
	if !ok {
		return link, 0, nil
	}
	lower, err := byIndex(vlan.ParentIndex)
	if err != nil {
		return nil, 0, fmt.Errorf("find the device below %s: %w", vlan.Name, err)
	}
	if vlan.VlanProtocol == netlink.VLAN_PROTOCOL_8021AD {
		return nil, 0, fmt.Errorf("%s is tagged by 802.1ad, and we send 802.1Q only; route by another device", vlan.Name)
	}
	return lower, uint16(vlan.VlanId), nil
}

// gateway is the address whose Ethernet address is wanted: dst itself when it
// is on the link. An IPv4 route may go through an IPv6 neighbour.
func gateway(found netlink.Route, dst netip.Addr) netip.Addr {
	gw := found.Gw
	if via, ok := found.Via.(*netlink.Via); ok {
		gw = via.Addr
	}
	if addr, ok := netip.AddrFromSlice(gw); ok && !addr.Unmap().IsUnspecified() {
		return addr.Unmap()
	}
	return dst
}

func mtu(found netlink.Route, link netlink.Link) uint16 {
	size := link.Attrs().MTU
	if found.MTU > 0 {
		size = min(size, found.MTU)
	}
	return uint16(min(size, 65535))
}

// neighbour returns the Ethernet address of a neighbour, and asks the kernel
// to look for it, or to look again, unless it has just been confirmed: our
// packets bypass the stack, so nothing else keeps the entry alive.
func (t *Table) neighbour(link int, addr netip.Addr) (lb.HardwareAddr, error) {
	known, err := t.dump()
	if err != nil {
		return lb.HardwareAddr{}, err
	}
	var mac lb.HardwareAddr
	entry, ok := known[neighbourKey{link, addr.WithZone("")}]
	resolved := ok && entry.State&usable != 0 && ethernet(entry.HardwareAddr, &mac)
	if !resolved || entry.State&unix.NUD_STALE != 0 {
		if err := t.poke(link, addr); err != nil {
			return lb.HardwareAddr{}, fmt.Errorf("ask for the neighbour: %w", err)
		}
	}
	if !resolved {
		return lb.HardwareAddr{}, ErrUnresolved
	}
	return mac, nil
}

// poke makes the kernel use the entry as if a packet were waiting for it.
func (t *Table) poke(link int, addr netip.Addr) error {
	return t.kernel.NeighSet(&netlink.Neigh{
		LinkIndex: link,
		Family:    family(addr),
		IP:        addr.AsSlice(),
		Flags:     unix.NTF_USE,
	})
}

func family(addr netip.Addr) int {
	if addr.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

func (t *Table) dump() (map[neighbourKey]netlink.Neigh, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.neighbours != nil && time.Since(t.dumped) < neighboursFor {
		return t.neighbours, nil
	}
	all := map[neighbourKey]netlink.Neigh{}
	for _, fam := range []int{unix.AF_INET, unix.AF_INET6} {
		entries, err := t.kernel.NeighList(0, fam)
		if err != nil {
			return nil, fmt.Errorf("list neighbours: %w", err)
		}
		for _, entry := range entries {
			if addr, ok := netip.AddrFromSlice(entry.IP); ok {
				all[neighbourKey{entry.LinkIndex, addr.Unmap()}] = entry
			}
		}
	}
	t.neighbours, t.dumped = all, time.Now()
	return all, nil
}

func ethernet(addr net.HardwareAddr, to *lb.HardwareAddr) bool {
	if len(addr) != len(to) {
		return false
	}
	copy(to[:], addr)
	return *to != lb.HardwareAddr{}
}
