// SPDX-License-Identifier: Apache-2.0

package testnet

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// end is one end of a veth pair.
type end struct {
	ns        *Namespace
	device    string
	addresses []netip.Prefix
}

// connect makes a veth pair between two namespaces, up and with addresses.
func connect(a, b end, mtu int) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = a.device
	attrs.MTU = mtu
	veth := netlink.NewVeth(attrs)
	veth.PeerName = b.device
	veth.PeerMTU = uint32(mtu)
	veth.PeerNamespace = netlink.NsFd(int(b.ns.fd))
	if err := a.ns.Netlink.LinkAdd(veth); err != nil {
		return fmt.Errorf("add veth %s-%s: %w", a.ns.Label, b.ns.Label, err)
	}
	for _, e := range []end{a, b} {
		if err := e.configure(); err != nil {
			return err
		}
	}
	return nil
}

func (e end) configure() error {
	link, err := e.ns.Netlink.LinkByName(e.device)
	if err != nil {
		return fmt.Errorf("find device %s in %s: %w", e.device, e.ns.Label, err)
	}
	for _, p := range e.addresses {
		if err := e.ns.AddAddress(e.device, p); err != nil {
			return err
		}
	}
	if err := e.ns.Netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("set up %s in %s: %w", e.device, e.ns.Label, err)
	}
	return nil
}

// AddAddress gives a device an address, usable at once.
func (n *Namespace) AddAddress(device string, p netip.Prefix) error {
	link, err := n.Netlink.LinkByName(device)
	if err != nil {
		return fmt.Errorf("find device %s in %s: %w", device, n.Label, err)
	}
	addr := &netlink.Addr{IPNet: ipNet(p)}
	if p.Addr().Is6() {
		addr.Flags = unix.IFA_F_NODAD
	}
	if err := n.Netlink.AddrAdd(link, addr); err != nil {
		return fmt.Errorf("add address %s to %s in %s: %w", p, device, n.Label, err)
	}
	return nil
}

// SetMTU changes the MTU of a device.
func (n *Namespace) SetMTU(device string, mtu int) error {
	link, err := n.Netlink.LinkByName(device)
	if err != nil {
		return fmt.Errorf("find device %s in %s: %w", device, n.Label, err)
	}
	if err := n.Netlink.LinkSetMTU(link, mtu); err != nil {
		return fmt.Errorf("set mtu of %s in %s: %w", device, n.Label, err)
	}
	return nil
}

// SetDown takes a device down.
func (n *Namespace) SetDown(device string) error {
	link, err := n.Netlink.LinkByName(device)
	if err != nil {
		return fmt.Errorf("find device %s in %s: %w", device, n.Label, err)
	}
	if err := n.Netlink.LinkSetDown(link); err != nil {
		return fmt.Errorf("set down %s in %s: %w", device, n.Label, err)
	}
	return nil
}

// Route is one route. Several gateways make the kernel spread flows over them.
type Route struct {
	To        netip.Prefix
	Via       []netip.Addr
	Device    string // needed when Via is on no subnet of the namespace
	MTU       int    // 0: the device's
	Blackhole bool
}

// SetRoute adds or replaces a route.
func (n *Namespace) SetRoute(r Route) error {
	route := &netlink.Route{Dst: ipNet(r.To), MTU: r.MTU, MTULock: r.MTU != 0}
	if r.Device != "" {
		index, err := n.Device(r.Device)
		if err != nil {
			return err
		}
		route.LinkIndex = index
		route.Scope = netlink.SCOPE_LINK
	}
	switch len(r.Via) {
	case 0:
	case 1:
		route.Gw = r.Via[0].AsSlice()
		route.Scope = netlink.SCOPE_UNIVERSE
		if r.Device != "" {
			route.Flags = int(netlink.FLAG_ONLINK)
		}
	default:
		for _, via := range r.Via {
			route.MultiPath = append(route.MultiPath, &netlink.NexthopInfo{Gw: via.AsSlice()})
		}
	}
	if r.Blackhole {
		route.Type = unix.RTN_BLACKHOLE
	}
	if err := n.Netlink.RouteReplace(route); err != nil {
		return fmt.Errorf("add route to %s in %s: %w", r.To, n.Label, err)
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// offloads leave checksums and segments to the receiver, which on a veth is
// the other end: an XDP program there would see neither.
var offloads = []uint32{
	unix.ETHTOOL_STXCSUM, unix.ETHTOOL_STSO, unix.ETHTOOL_SGSO, unix.ETHTOOL_SUFO,
}

// sendWhole makes a device send packets as they will be on a wire.
func (n *Namespace) sendWhole(device string) error {
	return n.Do(func() error {
		socket, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open socket: %w", err)
		}
		defer unix.Close(socket)
		for _, command := range offloads {
			if err := ethtoolOff(socket, device, command); err != nil {
				return fmt.Errorf("turn off offload %#x of %s in %s: %w", command, device, n.Label, err)
			}
		}
		return nil
	})
}

func ethtoolOff(socket int, device string, command uint32) error {
	value := struct{ command, data uint32 }{command: command}
	request := struct {
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		_    [16]byte
	}{data: unsafe.Pointer(&value)}
	copy(request.name[:unix.IFNAMSIZ-1], device)
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(socket), unix.SIOCETHTOOL,
		uintptr(unsafe.Pointer(&request)))
	if errno != 0 && !errors.Is(errno, unix.EOPNOTSUPP) {
		return errno
	}
	return nil
}

// tagInFrame makes a device write VLAN tags into frames, where XDP at the
// other end sees them.
func (n *Namespace) tagInFrame(device string) error {
	return n.Do(func() error {
		socket, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open socket: %w", err)
		}
		defer unix.Close(socket)
		// The only flag that veth can change here is this one.
		if err := ethtoolOff(socket, device, unix.ETHTOOL_SFLAGS); err != nil {
			return fmt.Errorf("turn off VLAN offload of %s in %s: %w", device, n.Label, err)
		}
		return nil
	})
}
