// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"bytes"
	"errors"
	"flag"
	"maps"
	"math/bits"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"fairlead.dev/fairlead/internal/file"
	"fairlead.dev/fairlead/internal/flowhash"
	"fairlead.dev/fairlead/internal/lb"
	"fairlead.dev/fairlead/internal/plan"
)

var update = flag.Bool("update", false, "rewrite golden files")

var errFake = errors.New("the map failed, as it does now and then")

// fakeMap is a map without a kernel, which fails as often as it is told to.
type fakeMap[K comparable, V any] struct {
	content map[K]V
	fails   func() bool
}

func (f *fakeMap[K, V]) Put(key K, value V) error {
	if f.fails() {
		return errFake
	}
	f.content[key] = value
	return nil
}

func (f *fakeMap[K, V]) Delete(key K) error {
	if f.fails() {
		return errFake
	}
	delete(f.content, key)
	return nil
}

func (f *fakeMap[K, V]) All() (map[K]V, error) { return maps.Clone(f.content), nil }

// fake is a dataplane without a kernel.
type fake struct {
	maps     *contents
	balancer *balancer
	receiver *receiver
	now      time.Time
	fails    func() bool
}

func newFake(tb testing.TB) *fake { return newFakeOf(tb, smallLimits) }

func newFakeOf(tb testing.TB, limits Limits) *fake {
	tb.Helper()
	f := &fake{now: time.Unix(0, 0), fails: func() bool { return false }}
	fails := func() bool { return f.fails() }
	f.maps = &contents{
		serviceWords: make([]uint64, limits.Services), slots: make([]uint64, limits.Slots), vipBits: make([]uint64, vipBitsWords),
		candidates: make([]bpfCandidateRow, limits.Candidates), denials: make([]uint64, limits.Services),
		backends: make([]bpfBackend, limits.Backends), nextHops: make([]bpfNextHop, limits.NextHops),
		services: &fakeMap[bpfServiceKey, uint32]{map[bpfServiceKey]uint32{}, fails},
		pods:     &fakeMap[bpfPodKey, bpfPod]{map[bpfPodKey]bpfPod{}, fails},
		lbNodes:  &fakeMap[bpfLbNodeKey, uint32]{map[bpfLbNodeKey]uint32{}, fails},

		floods:       &fakeMap[bpfPodKey, bpfFlood]{map[bpfPodKey]bpfFlood{}, fails},
		sourceRanges: &fakeMap[bpfSourceKey, uint32]{map[bpfSourceKey]uint32{}, fails},
		limits:       &fakeMap[uint32, bpfServiceLimit]{map[uint32]bpfServiceLimit{}, fails},
	}
	f.balancer = newBalancer(f.maps, limits, flowhash.Secret{1, 2, 3}.Tag)
	var err error
	f.receiver, err = newReceiver(f.maps, limits)
	must(tb, err)
	return f
}

func (f *fake) set(want Desired) error {
	f.now = f.now.Add(2 * rest)
	return errors.Join(f.balancer.set(want.Plan, want.NextHops, f.now), f.receiver.set(want.Plan))
}

func (f *fake) dump(tb testing.TB) string {
	tb.Helper()
	var text bytes.Buffer
	must(tb, dump(&text, f.maps))
	return text.String()
}

func TestDumpGolden(t *testing.T) {
	f := newFake(t)
	must(t, f.set(desired(testPlan(3))))
	golden(t, "testdata/plan.dump", f.dump(t))
}

func golden(t *testing.T, path, got string) {
	t.Helper()
	if *update {
		must(t, os.WriteFile(path, []byte(got), 0o644))
	}
	want, err := os.ReadFile(path)
	must(t, err)
	if got != string(want) {
		t.Errorf("dump:\n%s\nwant\n%s", got, want)
	}
}

// From YAML to what the maps of each node hold, and again after a change of the
// endpoints, where one begins to leave.
func TestExampleDumpGolden(t *testing.T) {
	text, err := os.ReadFile("../../examples/small.yaml")
	must(t, err)
	path := filepath.Join(t.TempDir(), "small.yaml")
	var dumps strings.Builder
	nodes := map[string]*fake{}
	const ready, leaving = "[10.244.1.2], conditions: {ready: true}", "[10.244.1.2], conditions: {ready: false, serving: true, terminating: true}"
	if !strings.Contains(string(text), ready) {
		t.Fatal("the example has no such endpoint any more")
	}
	for _, condition := range []string{ready, leaving} {
		edited := strings.Replace(string(text), ready, condition, 1)
		must(t, os.WriteFile(path, []byte(edited), 0o600))
		s, findings := file.Load([]string{path})
		if len(findings) > 0 {
			t.Fatal(findings)
		}
		for _, node := range s.Nodes {
			p, findings := plan.ForNode(s, node.Name)
			if len(findings) > 0 {
				t.Fatal(findings)
			}
			if nodes[node.Name] == nil {
				nodes[node.Name] = newFake(t)
			}
			must(t, nodes[node.Name].set(Desired{Plan: p}))
			dumps.WriteString("== " + node.Name + ", " + condition + "\n" + nodes[node.Name].dump(t))
		}
	}
	golden(t, "testdata/small.dump", dumps.String())
}

// Every mode and option, from YAML to what the maps of each node hold.
func TestServicesDumpGolden(t *testing.T) {
	s, findings := file.Load([]string{"../../examples"})
	if len(findings) > 0 {
		t.Fatal(findings)
	}
	var dumps strings.Builder
	for _, node := range s.Nodes {
		p, findings := plan.ForNode(s, node.Name)
		if len(findings) > 0 {
			t.Fatal(findings)
		}
		f := newFake(t)
		must(t, f.set(Desired{Plan: p}))
		dumps.WriteString("== " + node.Name + "\n" + f.dump(t))
	}
	golden(t, "testdata/services.dump", dumps.String())
}

// However often a map fails in between, going on with the same plan ends in
// the same maps.
func TestSetGoesOnAfterFailures(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	f := newFake(t)
	for round := range 200 {
		want := desired(testPlan(random.IntN(12)))
		if random.IntN(4) == 0 {
			want = want0()
		}
		f.fails = func() bool { return random.IntN(3) == 0 }
		for tries := 0; f.set(want) != nil; tries++ {
			if tries > 1000 {
				t.Fatal("never succeeds")
			}
		}
		must(t, f.balancer.expire(lb.Timeouts{TCP: time.Second, UDP: time.Second}, f.now.Add(time.Hour)))
		fresh := newFake(t)
		must(t, fresh.set(want))
		f.fails = func() bool { return false }
		got, expected := f.dump(t), fresh.dump(t)
		if got != expected {
			t.Fatalf("round %d: after failures\n%s\nfrom scratch\n%s", round, got, expected)
		}
		must(t, f.balancer.verify(want.Plan))
	}
}

// No number and no run of slots is used again within a second.
func TestFreedNumbersRest(t *testing.T) {
	now := time.Unix(0, 0)
	n := newNumbers("services", 3)
	first, err := n.take(now)
	must(t, err)
	_, err = n.take(now)
	must(t, err)
	n.give(first, now)
	if _, err := n.take(now.Add(rest - 1)); err == nil || !strings.Contains(err.Error(), "limits.services") {
		t.Errorf("take before the rest is over: %v", err)
	}
	if again, err := n.take(now.Add(rest)); err != nil || again != first {
		t.Errorf("take after the rest: %d, %v", again, err)
	}

	r := newRuns(1024)
	offset, err := r.take(10, now)
	must(t, err)
	r.give(offset, 10, now)
	if _, err := r.take(8, now.Add(rest-1)); err == nil {
		t.Error("a run was given out before it had rested")
	}
	if _, err := r.take(8, now.Add(rest)); err != nil {
		t.Error(err)
	}
}

// Runs never overlap, are aligned, and merge again when all are given back.
func TestRuns(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 4))
	const size = 5 << 16 // no power of two
	r, now := newRuns(size), time.Unix(0, 0)
	held := map[uint32]uint32{}
	for range 20_000 {
		now = now.Add(rest)
		if random.IntN(2) == 0 {
			width := 8 + uint32(random.IntN(8))
			offset, err := r.take(width, now)
			if err != nil {
				continue
			}
			for other, w := range held {
				if offset < other+1<<w && other < offset+1<<width {
					t.Fatalf("runs overlap: %d+%d and %d+%d", offset, 1<<width, other, 1<<w)
				}
			}
			if offset%(1<<width) != 0 || offset+1<<width > size {
				t.Fatalf("run at %d of %d", offset, 1<<width)
			}
			held[offset] = width
			continue
		}
		for offset, width := range held {
			r.give(offset, width, now)
			delete(held, offset)
			break
		}
	}
	for offset, width := range held {
		r.give(offset, width, now)
	}
	if r.used != 0 {
		t.Errorf("%d slots in use after all were given back", r.used)
	}
	for want := range 2 {
		if _, err := r.take(maxBits, now.Add(rest)); err != nil {
			t.Errorf("largest run %d after all were given back: %v", want, err)
		}
	}
}

func foreignProgram(tb testing.TB) *ebpf.Program {
	tb.Helper()
	spec := pass(0)
	spec.Name = "somebody"
	program, err := ebpf.NewProgram(spec)
	must(tb, err)
	tb.Cleanup(func() { program.Close() })
	return program
}

// crash is what a test's agent dies of.
type crash struct{}

// Whichever write is the last before a crash: a packet meets whole services
// alone, of which every slot leads to a backend that was filled in.
func TestCrashBetweenAnyTwoWrites(t *testing.T) {
	plans := []Desired{desired(testPlan(3)), desired(testPlan(12)), want0(), desired(testPlan(2))}
	for last := 1; ; last++ {
		f, writes := newFake(t), 0
		dies := func() {
			if writes++; writes == last {
				panic(crash{})
			}
		}
		f.maps.wrote = dies
		f.fails = func() bool { dies(); return false } // before a write to a hash map
		died := func() (died bool) {
			defer func() {
				if p := recover(); p != nil {
					if _, ours := p.(crash); !ours {
						panic(p)
					}
					died = true
				}
			}()
			for _, want := range plans {
				must(t, f.set(want))
			}
			return false
		}()
		f.whole(t)
		if t.Failed() {
			t.Fatalf("after write %d", last)
		}
		if !died {
			t.Logf("%d writes", last-1)
			return
		}
	}
}

// gated fails when a service asks for ranges or limits that are not there.
func (f *fake) gated(t *testing.T, number uint32, flags bpfServiceFlag) {
	t.Helper()
	ranges, err := f.maps.sourceRanges.All()
	must(t, err)
	limits, err := f.maps.limits.All()
	must(t, err)
	found := false
	for key := range ranges {
		found = found || bits.ReverseBytes32(key.Service) == number
	}
	if _, limited := limits[number]; flags&bpfServiceFlagSERVICE_RANGES != 0 && !found || flags&bpfServiceFlagSERVICE_LIMITS != 0 && !limited {
		t.Errorf("service %d asks for flags %#x, and has ranges %v, limits %v", number, flags, found, limited)
	}
}

// whole fails when a service's key leads to anything half-made.
func (f *fake) whole(t *testing.T) {
	t.Helper()
	services, err := f.maps.services.All()
	must(t, err)
	for key, number := range services {
		word := f.maps.serviceWords[number]
		if number == serviceNone {
			continue
		}
		if _, ok := services[bpfServiceKey{Vip: key.Vip}]; !ok {
			t.Errorf("%s has a service and is no VIP", addrOf(key.Vip))
		}
		bit, mask := vipBit(addrOf(key.Vip))
		if f.maps.vipBits[bit]&mask == 0 {
			t.Errorf("%s has a service and no bit", addrOf(key.Vip))
		}
		f.gated(t, number, bpfServiceFlag(word>>serviceFlagsShift))
		width := uint32(word>>serviceBitsShift) & 0xff
		for _, slot := range f.maps.slots[uint32(word) : uint32(word)+slotCount(width)] {
			named := append([]uint32{uint32(slot)}, f.maps.candidates[slot>>candidatesShift].Number[:]...)
			for i, backend := range named {
				row := f.maps.backends[backend]
				if backend == 0 && i > 0 {
					break
				}
				if row.Address == (bpfAddr{}) || row.Mode == 0 || wordState(row.Word) == bpfBackendStateBACKEND_UNUSED {
					t.Errorf("a slot of %s leads to backend %d: %+v", addrOf(key.Vip), backend, row)
				}
				if hop := uint32(row.Word); hop != 0 && f.maps.nextHops[hop].Ifindex == 0 {
					t.Errorf("backend %d leads to next hop %d, which is empty", backend, hop)
				}
			}
		}
	}
}
