// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"fairlead.dev/fairlead/internal/flowhash"
	"fairlead.dev/fairlead/internal/lb"
	"fairlead.dev/fairlead/internal/maglev"
	"fairlead.dev/fairlead/internal/need"
)

// vethNamespace moves the test's thread into a new network namespace with a
// veth pair "eth0" and "peer". Both go with the thread.
func vethNamespace(tb testing.TB) {
	tb.Helper()
	need.Root(tb)
	runtime.LockOSThread() // never unlocked: the thread ends with the test
	old, err := netns.Get()
	must(tb, err)
	fresh, err := netns.New()
	must(tb, err)
	tb.Cleanup(func() {
		must(tb, netns.Set(old))
		fresh.Close()
		old.Close()
	})
	must(tb, netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0", MTU: 1500}, PeerName: "peer"}))
	for _, name := range []string{"lo", "eth0", "peer"} {
		device, err := netlink.LinkByName(name)
		must(tb, err)
		must(tb, netlink.LinkSetUp(device))
	}
}

func must(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}

// pinDir is a fresh directory on the BPF file system.
func pinDir(tb testing.TB) string {
	tb.Helper()
	dir := filepath.Join("/sys/fs/bpf", fmt.Sprintf("fl-test-%d-%d", os.Getpid(), time.Now().UnixNano()))
	tb.Cleanup(func() { must(tb, Cleanup(dir)) })
	return dir
}

func openTest(tb testing.TB, dir string, limits Limits) *Dataplane {
	tb.Helper()
	secret := flowhash.Secret{1, 2, 3}
	d, err := Open(Config{Interfaces: []string{"eth0"}, PinDir: dir, Secret: &secret, Tag: secret.Tag("lb-1"), VNI: 1,
		GenevePort: 6082, Limits: limits, Log: slog.New(slog.DiscardHandler)})
	must(tb, err)
	tb.Cleanup(func() { must(tb, d.Close()) })
	return d
}

var smallLimits = Limits{Services: 64, Slots: 1 << 14, Candidates: 4096, Hints: 64, Backends: 64, NextHops: 16, Pods: 16, Flows: 1024, Pending: 1024, Fragments: 64, LBNodes: 8, SourceRanges: 64}

// testPlan is both roles on one node: a service of n backends on workers, and
// one of a Pod on this node.
func testPlan(n int) lb.Plan {
	var backends []lb.Backend
	for i := range n {
		backends = append(backends, lb.Backend{Node: "worker-1", Weight: 1, State: lb.Active, ID: lb.BackendID{
			Target: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 244, 1, byte(i + 1)}), 8080),
			Tunnel: netip.MustParseAddr("10.0.0.11"), Mode: lb.ModeGeneve}})
	}
	// As many source ranges as backends, and limits for an odd number of them.
	var ranges []netip.Prefix
	for i := range n {
		ranges = append(ranges, netip.PrefixFrom(netip.AddrFrom4([4]byte{198, byte(51 + i), 0, 0}), 16))
	}
	limits := lb.Limits{}
	if n%2 == 1 {
		limits.All.Packets = uint64(n) * 1000
	}
	local := netip.MustParseAddrPort("10.244.0.9:53")
	web := lb.ServiceID{Namespace: "default", Name: "web"}
	dns := lb.ServiceID{Namespace: "default", Name: "dns"}
	return lb.Plan{
		Node: "lb-1", LoadBalancer: true, Backend: true,
		TunnelAddresses: []netip.Addr{netip.MustParseAddr("10.0.0.1")},
		Frontends: []lb.Frontend{
			{ID: lb.FrontendID{VIP: netip.MustParseAddr("192.0.2.1"), Port: 53, Protocol: lb.UDP}, Service: dns, Independent: true, TableSize: 256,
				Backends: []lb.Backend{{Node: "lb-1", Weight: 1, State: lb.Active, ID: lb.BackendID{Target: local, Mode: lb.ModeLocal, Local: local}}}},
			{ID: lb.FrontendID{VIP: netip.MustParseAddr("192.0.2.1"), Port: 80, Protocol: lb.TCP}, Service: web, TableSize: maglev.Size(n), Backends: backends, SourceRanges: ranges, Limits: limits},
		},
		Pods:    []lb.Pod{{Target: local, Protocol: lb.UDP, Serves: []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:53")}, Service: dns}},
		LBNodes: []lb.LBNode{{Prefix: netip.MustParsePrefix("10.0.0.1/32"), Node: "lb-1"}},
	}
}

func desired(plan lb.Plan) Desired {
	return Desired{Plan: plan, MTU: 1500, NextHops: map[netip.Addr]lb.NextHop{netip.MustParseAddr("10.0.0.11"): {
		Interface: 2, Source: lb.HardwareAddr{2, 0, 0, 0, 0, 1}, Target: lb.HardwareAddr{2, 0, 0, 0, 0, 2}, MTU: 1500}}}
}

func dumped(tb testing.TB, d *Dataplane) string {
	tb.Helper()
	var text bytes.Buffer
	must(tb, d.Dump(&text))
	return text.String()
}

func TestSetVerifyReadTrace(t *testing.T) {
	vethNamespace(t)
	d := openTest(t, pinDir(t), smallLimits)
	want := desired(testPlan(3))
	must(t, d.Set(context.Background(), want))
	must(t, d.Verify(want))
	first := dumped(t, d)
	must(t, d.Set(context.Background(), want))
	if again := dumped(t, d); again != first {
		t.Errorf("the same plan set twice:\n%s\nthen\n%s", first, again)
	}
	state, err := d.Read()
	must(t, err)
	if len(state.Frontends) != 2 || len(state.Frontends[1].Backends) != 3 || len(state.Attachments) != 1 {
		t.Errorf("state: %+v", state)
	}
	total := uint32(0)
	for _, b := range state.Frontends[1].Backends {
		total += b.Slots
		if b.State != "active" || !b.NextHop || b.Slots == 0 {
			t.Errorf("backend: %+v", b)
		}
	}
	if total != state.Frontends[1].Slots {
		t.Errorf("slots of backends add up to %d of %d", total, state.Frontends[1].Slots)
	}

	frame := benchFrame("syn", 4, netip.MustParseAddr("192.0.2.1"))
	copy(frame[26:], []byte{198, 51, 100, 7})
	trace, err := d.Trace(frame, 2)
	must(t, err)
	if trace.Verdict != "forward" || trace.Service != state.Frontends[1].Number || trace.Backend == 0 {
		t.Errorf("trace: %+v", trace)
	}
	after, err := d.Read()
	must(t, err)
	if after.Frontends[1].Packets != 0 {
		t.Error("a trace was counted")
	}
}

// Every change of backends ends in the same maps as a fresh start with the
// same plan would, once nobody remembers what was before.
func TestSetEndsAsAFreshStart(t *testing.T) {
	vethNamespace(t)
	d := openTest(t, pinDir(t), smallLimits)
	now := time.Now()
	d.now = func() time.Time { now = now.Add(2 * rest); return now }
	for _, n := range []int{3, 10, 2, 5, 1, 20} {
		want := desired(testPlan(n))
		must(t, d.Set(context.Background(), want))
		must(t, d.Verify(want))
		now = now.Add(defaultTCP) // the contests are over
		must(t, d.Expire())
		must(t, d.Verify(want))
		changed := dumped(t, d)
		fresh := newFake(t)
		must(t, fresh.set(want))
		if got := fresh.dump(t); got != changed {
			t.Fatalf("%d backends: after changes\n%s\nfrom scratch\n%s", n, changed, got)
		}
	}
	empty := want0()
	must(t, d.Set(context.Background(), empty))
	if got := dumped(t, d); strings.Contains(got, "service") || strings.Contains(got, "vip") || strings.Contains(got, "range") || strings.Contains(got, "limits") {
		t.Errorf("after removal of all services:\n%s", got)
	}
	for at, word := range d.maps.vipBits {
		if word != 0 {
			t.Errorf("vip_bits[%d] = %#x after all VIPs have gone", at, word)
		}
	}
}

func want0() Desired {
	plan := testPlan(0)
	plan.Frontends, plan.Pods = nil, nil
	return desired(plan)
}

func TestSetRefusesBeforeItWrites(t *testing.T) {
	vethNamespace(t)
	d := openTest(t, pinDir(t), smallLimits)
	good := desired(testPlan(3))
	must(t, d.Set(context.Background(), good))
	before := dumped(t, d)
	for want, change := range map[string]func(*lb.Plan){
		"raise limits.backends": func(p *lb.Plan) { p.Frontends = testPlan(100).Frontends },
		"raise limits.slots":    func(p *lb.Plan) { p.Frontends[1].TableSize = 65536 },
		"is a loopback address": func(p *lb.Plan) { p.Frontends[1].Backends[0].ID.Target = netip.MustParseAddrPort("127.0.0.1:80") },
		"is a VIP":              func(p *lb.Plan) { p.Frontends[1].Backends[0].ID.Target = netip.MustParseAddrPort("192.0.2.1:80") },
		"serves 9 VIPs":         func(p *lb.Plan) { p.Pods[0].Serves = make([]netip.AddrPort, 9) },
	} {
		bad := desired(testPlan(3))
		change(&bad.Plan)
		err := d.Set(context.Background(), bad)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Set: %v; want an error with %q", err, want)
		}
		if after := dumped(t, d); after != before {
			t.Errorf("%s: maps changed:\n%s\nfrom\n%s", want, after, before)
		}
	}
}

func TestVerifyFindsDamage(t *testing.T) {
	vethNamespace(t)
	d := openTest(t, pinDir(t), smallLimits)
	want := desired(testPlan(3))
	must(t, d.Set(context.Background(), want))
	for name, damage := range map[string]func(){
		"slots":         func() { d.maps.slots[d.balancer.frontends[want.Plan.Frontends[1].ID].offset] = 7 },
		"services":      func() { must(t, d.maps.services.Delete(serviceKey(want.Plan.Frontends[1].ID))) },
		"service_words": func() { d.maps.serviceWords[1] = 0 },
		"pods": func() {
			must(t, d.loaded.Pods.Delete(bpfPodKey{Address: bpfAddrOf(netip.MustParseAddr("10.244.0.9")), Port: swap16(53), Proto: 17}))
		},
	} {
		damage()
		if err := d.Verify(want); err == nil {
			t.Errorf("%s damaged: Verify found nothing", name)
		}
		d.Doubt()
		must(t, d.Set(context.Background(), want))
		if err := d.Verify(want); err != nil {
			t.Errorf("%s damaged, then set again: %v", name, err)
		}
	}
}

// A second agent takes over: the link is updated in place, never detached, and
// the table of flows is the same.
func TestRestartAdopts(t *testing.T) {
	vethNamespace(t)
	dir := pinDir(t)
	want := desired(testPlan(3))
	first := openTest(t, dir, smallLimits)
	must(t, first.Set(context.Background(), want))
	local := want.Plan.Pods[0].Target
	owned := bpfFlow{State: uint8(bpfFlowStateFLOW_ESTABLISHED), Pod: bpfAddrOf(local.Addr()), PodPort: swap16(local.Port())}
	gone := owned
	gone.PodPort++
	must(t, first.loaded.Flows.Put(bpfFlowKey{Proto: 17}, owned))
	must(t, first.loaded.Flows.Put(bpfFlowKey{Proto: 17, Pad: [3]uint8{1}}, gone))
	must(t, first.Close())
	device, err := netlink.LinkByName("eth0")
	must(t, err)
	if device.Attrs().Xdp == nil || !device.Attrs().Xdp.Attached {
		t.Fatal("nothing forwards after Close")
	}
	second := openTest(t, dir, smallLimits)
	must(t, second.Set(context.Background(), want))
	must(t, second.Verify(want))
	var flow bpfFlow
	if err := second.loaded.Flows.Lookup(bpfFlowKey{Proto: 17}, &flow); err != nil {
		t.Errorf("a flow of before: %v", err)
	}
	if err := second.loaded.Flows.Lookup(bpfFlowKey{Proto: 17, Pad: [3]uint8{1}}, &flow); !errors.Is(err, ebpf.ErrKeyNotExist) {
		t.Errorf("a flow of a Pod that has gone: %v", err)
	}
	must(t, second.Close())
	must(t, Cleanup(dir))
	if device, err = netlink.LinkByName("eth0"); err != nil || device.Attrs().Xdp != nil && device.Attrs().Xdp.Attached {
		t.Errorf("after Cleanup: XDP %+v, %v", device.Attrs().Xdp, err)
	}
}

func TestForeignXDPIsNotReplaced(t *testing.T) {
	vethNamespace(t)
	device, err := netlink.LinkByName("eth0")
	must(t, err)
	foreign := foreignProgram(t)
	must(t, netlink.LinkSetXdpFd(device, foreign.FD()))
	d := openTest(t, pinDir(t), smallLimits)
	err = d.Set(context.Background(), desired(testPlan(1)))
	if err == nil || !strings.Contains(err.Error(), "(somebody)") || !strings.Contains(err.Error(), "xdp off") {
		t.Errorf("Set: %v; want an error that names the program and the way out", err)
	}
}

// As many services as limits.services says, each on a VIP of its own, fit.
func TestAsManyServicesAsTheLimit(t *testing.T) {
	vethNamespace(t)
	d := openTest(t, pinDir(t), smallLimits)
	want := desired(testPlan(1))
	web := want.Plan.Frontends[1]
	want.Plan.Frontends = nil
	for i := range smallLimits.Services - 1 {
		web.ID.VIP = netip.AddrFrom4([4]byte{198, 51, 100, byte(i)})
		want.Plan.Frontends = append(want.Plan.Frontends, web)
	}
	must(t, d.Set(context.Background(), want))
	must(t, d.Verify(want))
}

// A Pod that is gone has no flows, nor has another that has its address now.
func TestFlowsOfPodsThatAreGone(t *testing.T) {
	vethNamespace(t)
	d := openTest(t, pinDir(t), smallLimits)
	want := desired(testPlan(1))
	want.Plan.Pods[0].UID = "first"
	must(t, d.Set(context.Background(), want))
	local := want.Plan.Pods[0].Target
	flow := bpfFlow{State: uint8(bpfFlowStateFLOW_ESTABLISHED), Pod: bpfAddrOf(local.Addr()), PodPort: swap16(local.Port()), Hash: 1 << 63}
	key := bpfFlowKey{Proto: 17, Vip: bpfAddrOf(netip.MustParseAddr("192.0.2.1")), VipPort: swap16(53)}
	count := func() int {
		n := 0
		must(t, eachFlow(d.loaded.Flows, func(bpfFlowKey, *bpfFlow) { n++ }))
		must(t, eachFlow(d.loaded.Pending, func(bpfFlowKey, *bpfFlow) { n++ }))
		return n
	}
	put := func() {
		must(t, d.loaded.Flows.Put(key, flow))
		must(t, d.loaded.Pending.Put(bpfFlowKey{Proto: 17, ClientPort: 9}, flow))
		must(t, d.Set(context.Background(), want))
	}
	put()
	if got := count(); got != 2 {
		t.Errorf("%d flows, want 2", got)
	}
	owned, err := d.Owned()
	must(t, err)
	flows, slots := owned.Slots(netip.MustParseAddrPort("192.0.2.1:53"), lb.UDP, local, 8)
	if flows != 1 || len(slots) != 4 || slots[2] != 1 {
		t.Errorf("owned: %d flows in %#x", flows, slots)
	}
	want.Plan.Pods = slices.Clone(want.Plan.Pods)
	want.Plan.Pods[0].UID = "second"
	must(t, d.Set(context.Background(), want))
	if got := count(); got != 0 {
		t.Errorf("%d flows of a Pod whose address another has", got)
	}
	put()
	want.Plan.Pods = nil
	must(t, d.Set(context.Background(), want))
	if got := count(); got != 0 {
		t.Errorf("%d flows of a Pod that has gone", got)
	}
}

// An agent that starts goes on with the slots of the program that is attached,
// and knows who had them before.
func TestRestartAdoptsTables(t *testing.T) {
	vethNamespace(t)
	dir := pinDir(t)
	before, after := desired(testPlan(4)), desired(testPlan(4))
	web := &after.Plan.Frontends[1]
	web.Backends = slices.Clone(web.Backends)
	web.Backends[0].State = lb.Draining
	first := openTest(t, dir, smallLimits)
	must(t, first.Set(context.Background(), before))
	had := map[uint32]bool{} // the slots of the backend that drains then
	f := first.balancer.frontends[web.ID]
	for slot := range uint32(f.table.Len()) {
		had[slot] = f.table.Owner(slot) == first.balancer.backends[web.Backends[0].ID].number
	}
	must(t, first.Close())
	for range 2 { // changed while no agent ran, and the contest outlives another
		second := openTest(t, dir, smallLimits)
		must(t, second.Set(context.Background(), after))
		must(t, second.Verify(after))
		f := second.balancer.frontends[web.ID]
		drained := second.balancer.backends[web.Backends[0].ID].number
		for slot := range uint32(f.table.Len()) {
			if list := f.table.Candidates(slot); list.Has(drained) != had[slot] || f.table.Owner(slot) == drained {
				t.Fatalf("slot %d has %d and %v; the drained backend %d had it: %v", slot, f.table.Owner(slot), list, drained, had[slot])
			}
		}
		must(t, second.Close())
	}
}

// What is said to move moves, in tables of the same and of another size, and
// nothing is changed by asking.
func TestSimulate(t *testing.T) {
	vethNamespace(t)
	d := openTest(t, pinDir(t), smallLimits)
	before := desired(testPlan(5))
	must(t, d.Set(context.Background(), before))
	dump := dumped(t, d)
	for n, most := range map[int]float64{5: 0, 4: 0.35, 12: 0.95, 1: 0.9} {
		after := testPlan(n)
		all, err := d.Simulate(after)
		must(t, err)
		if len(all) != 2 || all[0].Moved != 0 || all[0].SlotsNow != 256 {
			t.Fatalf("%+v", all)
		}
		web := all[1]
		if least := most / 2; web.Moved < least || web.Moved > most || web.SlotsThen != after.Frontends[1].TableSize || len(web.Gone) != max(0, 5-n) {
			t.Errorf("%d backends: %+v", n, web)
		}
		for _, gone := range web.Gone {
			if web.Lost[gone] != 1 {
				t.Errorf("%d backends: %s keeps something", n, gone.Target)
			}
		}
	}
	if got := dumped(t, d); got != dump {
		t.Errorf("simulating changed the maps:\n%s", got)
	}
}

// Pins that somebody removed are put back, so that what is attached outlives
// the agent again.
func TestRemovedPinsComeBack(t *testing.T) {
	vethNamespace(t)
	dir := pinDir(t)
	d := openTest(t, dir, smallLimits)
	want := desired(testPlan(2))
	must(t, d.Set(context.Background(), want))
	before, err := os.ReadDir(dir)
	must(t, err)
	for _, pin := range before {
		must(t, os.Remove(filepath.Join(dir, pin.Name())))
	}
	must(t, d.Set(context.Background(), want))
	after, err := os.ReadDir(dir)
	must(t, err)
	if len(before) < 5 || fmt.Sprint(before) != fmt.Sprint(after) {
		t.Errorf("the pins were %v, and are %v", before, after)
	}
	must(t, d.Close())
	device, err := netlink.LinkByName("eth0")
	must(t, err)
	if device.Attrs().Xdp == nil || !device.Attrs().Xdp.Attached {
		t.Error("nothing forwards after Close")
	}
}

// When nobody takes new flows, the slots stay for those who have older ones,
// also for an agent that begins then.
func TestNobodyTakesNewFlows(t *testing.T) {
	vethNamespace(t)
	dir := pinDir(t)
	want := desired(testPlan(3))
	first := openTest(t, dir, smallLimits)
	must(t, first.Set(context.Background(), want))
	want = desired(testPlan(3))
	for i := range want.Plan.Frontends[1].Backends {
		want.Plan.Frontends[1].Backends[i].State = lb.Failing
	}
	expect := func(d *Dataplane) {
		t.Helper()
		must(t, d.Set(context.Background(), want))
		must(t, d.Verify(want))
		if f := d.balancer.frontends[want.Plan.Frontends[1].ID]; f.table.Contested() != f.table.Len() || f.table.Len() == 0 || f.table.Owner(0) != 0 {
			t.Errorf("%d of %d slots are contested, and backend %d has the first", f.table.Contested(), f.table.Len(), f.table.Owner(0))
		}
	}
	expect(first)
	must(t, first.Close())
	second := openTest(t, dir, smallLimits)
	expect(second)
	must(t, second.Close())
}

// A program that is loaded anew works on the same maps, all of them: what Go
// writes and what packets leave behind stays where both look.
func TestReloadKeepsMaps(t *testing.T) {
	vethNamespace(t)
	d := openTest(t, pinDir(t), smallLimits)
	want := desired(testPlan(3))
	must(t, d.Set(context.Background(), want))
	ids := func() map[string]ebpf.MapID {
		all := map[string]ebpf.MapID{}
		for name, m := range d.loaded.shared() {
			info, err := m.Info()
			must(t, err)
			all[name], _ = info.ID()
		}
		return all
	}
	before := ids()
	want.MTU = 1400
	must(t, d.Set(context.Background(), want))
	must(t, d.Verify(want))
	after := ids()
	if len(before) < 30 || !maps.Equal(before, after) {
		t.Errorf("%d maps before\n%v\nafter\n%v", len(before), before, after)
	}
}
