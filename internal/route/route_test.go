// SPDX-License-Identifier: Apache-2.0

package route

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"fairlead.dev/fairlead/internal/lb"
	"fairlead.dev/fairlead/internal/need"
)

// inNamespace moves the test's thread into a new network namespace, which
// goes when the thread does.
func inNamespace(t *testing.T) {
	t.Helper()
	need.Root(t)
	runtime.LockOSThread() // never unlocked: the thread ends with the test
	old, err := netns.Get()
	must(t, err)
	fresh, err := netns.New()
	must(t, err)
	t.Cleanup(func() {
		if err := netns.Set(old); err != nil {
			t.Error(err)
		}
		fresh.Close()
		old.Close()
	})
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// pair makes veth "up" (with addresses) and its peer "peer" in the same
// namespace; neighbours are entered by hand.
func pair(t *testing.T) netlink.Link {
	t.Helper()
	must(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "up", MTU: 1600}, PeerName: "peer"}))
	for _, name := range []string{"lo", "up", "peer"} {
		link, err := netlink.LinkByName(name)
		must(t, err)
		must(t, netlink.LinkSetUp(link))
	}
	up, err := netlink.LinkByName("up")
	must(t, err)
	address(t, up, "10.0.0.1/24")
	address(t, up, "fd00::1/64")
	return up
}

func address(t *testing.T, link netlink.Link, cidr string) {
	t.Helper()
	addr, err := netlink.ParseAddr(cidr)
	must(t, err)
	addr.Flags = 0x02 // IFA_F_NODAD: usable at once
	must(t, netlink.AddrAdd(link, addr))
}

func neighbour(t *testing.T, link netlink.Link, addr, mac string) {
	t.Helper()
	hw, err := net.ParseMAC(mac)
	must(t, err)
	must(t, netlink.NeighSet(&netlink.Neigh{LinkIndex: link.Attrs().Index, IP: netip.MustParseAddr(addr).AsSlice(),
		State: netlink.NUD_PERMANENT, HardwareAddr: hw}))
}

func via(t *testing.T, dst, gw string, mtu int) {
	t.Helper()
	_, prefix, err := net.ParseCIDR(dst)
	must(t, err)
	must(t, netlink.RouteAdd(&netlink.Route{Dst: prefix, Gw: net.ParseIP(gw), MTU: mtu}))
}

func hardware(t *testing.T, s string) (h lb.HardwareAddr) {
	t.Helper()
	mac, err := net.ParseMAC(s)
	must(t, err)
	copy(h[:], mac)
	return h
}

func TestResolve(t *testing.T) {
	inNamespace(t)
	up := pair(t)
	neighbour(t, up, "10.0.0.2", "02:00:00:00:00:02")
	neighbour(t, up, "fd00::2", "02:00:00:00:00:06")
	via(t, "10.1.0.0/16", "10.0.0.2", 1400)
	via(t, "fd01::/16", "fd00::2", 0)
	table, err := New([]string{"up"})
	must(t, err)
	defer table.Close()

	own := hardware(t, up.Attrs().HardwareAddr.String())
	index := up.Attrs().Index
	for dst, want := range map[string]lb.NextHop{
		"10.0.0.2": {Interface: index, Source: own, Target: hardware(t, "02:00:00:00:00:02"), MTU: 1600},
		"10.1.2.3": {Interface: index, Source: own, Target: hardware(t, "02:00:00:00:00:02"), MTU: 1400},
		"fd00::2":  {Interface: index, Source: own, Target: hardware(t, "02:00:00:00:00:06"), MTU: 1600},
		"fd01::5":  {Interface: index, Source: own, Target: hardware(t, "02:00:00:00:00:06"), MTU: 1600},
	} {
		got, err := table.Resolve(netip.MustParseAddr(dst))
		if err != nil || got != want {
			t.Errorf("Resolve(%s) = %+v, %v; want %+v", dst, got, err, want)
		}
	}
}

func TestResolveRefuses(t *testing.T) {
	inNamespace(t)
	pair(t)
	via(t, "10.2.0.0/16", "10.0.0.9", 0)
	table, err := New([]string{"other"})
	must(t, err)
	defer table.Close()
	for dst, want := range map[string]string{
		"10.0.0.1":  "is an address of this node",
		"10.0.0.2":  "add it to interfaces",
		"192.0.2.1": "look up the route",
	} {
		_, err := table.Resolve(netip.MustParseAddr(dst))
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Resolve(%s): %v; want an error with %q", dst, err, want)
		}
	}
}

// An unresolved neighbour is looked for, and once it has an address Watch
// tells and Resolve returns it.
func TestUnresolvedIsAskedForAndWatched(t *testing.T) {
	inNamespace(t)
	up := pair(t)
	table, err := New([]string{"up"})
	must(t, err)
	defer table.Close()
	dst := netip.MustParseAddr("10.0.0.3")
	if _, err := table.Resolve(dst); !errors.Is(err, ErrUnresolved) {
		t.Fatalf("Resolve = %v, want ErrUnresolved", err)
	}
	entries, err := netlink.NeighList(up.Attrs().Index, netlink.FAMILY_V4)
	must(t, err)
	if len(entries) != 1 || !entries[0].IP.Equal(net.IP(dst.AsSlice())) {
		t.Fatalf("neighbours after Resolve: %v, want an entry for %s being looked for", entries, dst)
	}

	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	first := true
	err = table.Watch(ctx, func() {
		if first {
			first = false
			neighbour(t, up, dst.String(), "02:00:00:00:00:03")
			return
		}
		if hop, err := table.Resolve(dst); err == nil && hop.Target == hardware(t, "02:00:00:00:00:03") {
			cancel()
		}
	})
	must(t, err)
	if !errors.Is(ctx.Err(), context.Canceled) {
		t.Fatal("Watch did not tell of the neighbour within 5 s")
	}
}

func TestPodInterface(t *testing.T) {
	inNamespace(t)
	up := pair(t)
	peer, err := netlink.LinkByName("peer")
	must(t, err)
	_, pod, _ := net.ParseCIDR("10.244.0.5/32")
	must(t, netlink.RouteAdd(&netlink.Route{LinkIndex: peer.Attrs().Index, Dst: pod, Scope: netlink.SCOPE_LINK}))
	table, err := New([]string{up.Attrs().Name})
	must(t, err)
	defer table.Close()
	if got, err := table.PodInterface(netip.MustParseAddr("10.244.0.5")); err != nil || got != peer.Attrs().Index {
		t.Errorf("PodInterface = %d, %v; want %d", got, err, peer.Attrs().Index)
	}
	if _, err := table.PodInterface(netip.MustParseAddr("10.0.0.77")); err == nil || !strings.Contains(err.Error(), "not on this node") {
		t.Errorf("PodInterface of an address behind the uplink: %v", err)
	}
}

// Not every kernel that the tests run on has VLAN devices, so this one is
// made of values.
func TestUntagged(t *testing.T) {
	lower := &netlink.Device{LinkAttrs: netlink.LinkAttrs{Name: "eth0", Index: 2}}
	tagged := &netlink.Vlan{LinkAttrs: netlink.LinkAttrs{Name: "eth0.7", Index: 3, ParentIndex: 2}, VlanId: 7}
	byIndex := func(i int) (netlink.Link, error) {
		if i == lower.Index {
			return lower, nil
		}
		return nil, errors.New("no such device")
	}
	if device, vlan, err := untagged(lower, byIndex); device != netlink.Link(lower) || vlan != 0 || err != nil {
		t.Errorf("plain device: %v, %d, %v", device, vlan, err)
	}
	if device, vlan, err := untagged(tagged, byIndex); device != netlink.Link(lower) || vlan != 7 || err != nil {
		t.Errorf("VLAN device: %v, %d, %v", device, vlan, err)
	}
	tagged.ParentIndex = 9
	if _, _, err := untagged(tagged, byIndex); err == nil {
		t.Error("a VLAN device above nothing was accepted")
	}
	tagged.ParentIndex, tagged.VlanProtocol = 2, netlink.VLAN_PROTOCOL_8021AD
	if _, _, err := untagged(tagged, byIndex); err == nil || !strings.Contains(err.Error(), "802.1ad") {
		t.Errorf("802.1ad: %v", err)
	}
}
