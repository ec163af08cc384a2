// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"flag"
	"fmt"
	"math/bits"
	"net/netip"
	"os"
	"sync"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"

	"fairlead.dev/fairlead/internal/flowhash"
	"fairlead.dev/fairlead/internal/need"
)

const (
	xdpDrop     = 1
	xdpPass     = 2
	xdpTX       = 3
	xdpRedirect = 4

	// Test runs come in by the loopback device.
	ingress = 1

	podPort    = 8080
	genevePort = 6082
	testVNI    = 0x010203
)

var (
	vip4, vip6       = netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")
	client4, client6 = netip.MustParseAddr("203.0.113.9"), netip.MustParseAddr("2001:db8:c::9")
	node4, node6     = netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")
	worker4, worker6 = netip.MustParseAddr("10.0.0.11"), netip.MustParseAddr("fd00::11")
	pod4, pod6       = netip.MustParseAddr("10.1.0.5"), netip.MustParseAddr("fd01::5")
	testKey          = flowhash.Secret{1, 2, 3}.FlowKey()
	testTag          = [8]byte{1, 2, 3, 4, 5, 6, 7, 8}
)

// reached collects the drop reasons that tests have reached.
var reached struct {
	sync.Mutex
	drops map[bpfDrop]bool
}

// TestMain fails a full run in which a named drop reason was never reached.
func TestMain(m *testing.M) {
	flag.Parse()
	code := m.Run()
	whole := flag.Lookup("test.run").Value.String() == "" && flag.Lookup("test.skip").Value.String() == ""
	if code == 0 && whole && os.Geteuid() == 0 {
		if missing := unreachedDrops(); len(missing) > 0 {
			fmt.Fprintln(os.Stderr, "FAIL: drop reasons that no test reached:", missing)
			code = 1
		}
	}
	os.Exit(code)
}

func unreachedDrops() (missing []string) {
	spec, err := loadBpf()
	if err != nil {
		return []string{err.Error()}
	}
	var reasons *btf.Enum
	if err := spec.Types.TypeByName("drop", &reasons); err != nil {
		return []string{err.Error()}
	}
	reached.Lock()
	defer reached.Unlock()
	for _, reason := range reasons.Values {
		drop := bpfDrop(reason.Value)
		if drop != bpfDropDROP_NONE && drop != bpfDropDROP_MAX && !reached.drops[drop] {
			missing = append(missing, reason.Name)
		}
	}
	return missing
}

// noteDrops reads the drop counters, and remembers the reasons reached.
func noteDrops(t testing.TB, drops *ebpf.Map) map[bpfDrop]uint64 {
	t.Helper()
	reached.Lock()
	defer reached.Unlock()
	if reached.drops == nil {
		reached.drops = map[bpfDrop]bool{}
	}
	counts := map[bpfDrop]uint64{}
	for reason := range uint32(bpfDropDROP_MAX) {
		if n := perCPU(t, drops, reason); n > 0 {
			counts[bpfDrop(reason)] = n
			reached.drops[bpfDrop(reason)] = true
		}
	}
	return counts
}

func perCPU(t testing.TB, m *ebpf.Map, key uint32) (sum uint64) {
	t.Helper()
	var values []uint64
	if err := m.Lookup(key, &values); err != nil {
		t.Fatal(err)
	}
	for _, v := range values {
		sum += v
	}
	return sum
}

// network is one LB node's programs on maps of their own, and nothing else.
type network struct {
	t testing.TB
	bpfObjects
	config                          bpfConfig
	services, backends, hops, slots uint32
}

// newNetwork loads the programs as an LB node has them; edit may change that.
func newNetwork(t testing.TB, edit func(*bpfConfig)) *network {
	t.Helper()
	need.Root(t)
	spec, err := loadBpf()
	if err != nil {
		t.Fatal(err)
	}
	words := testKey.Words()
	config := bpfConfig{Key: words, Node4: wireAddr(node4), Node6: wireAddr(node6), Ipip4: wireAddr(node4),
		Ipip6: wireAddr(node6), Vni: testVNI, GenevePort: wirePort(genevePort), BudgetFloor: budgetFloor, Lb: 1}
	if edit != nil {
		edit(&config)
	}
	if err := spec.Variables["config"].Set(config); err != nil {
		t.Fatal(err)
	}
	if config.Backend == 0 {
		// Of no use to an LB node alone, and most of what the verifier walks.
		for _, name := range []string{"fairlead_egress", "fairlead_pod"} {
			spec.Programs[name].Instructions = asm.Instructions{asm.Mov.Imm(asm.R0, -1), asm.Return()}
		}
	}
	n := &network{t: t, config: config, services: 1, backends: 1, hops: 1}
	if err := spec.LoadAndAssign(&n.bpfObjects, nil); err != nil {
		t.Fatalf("%+v", err)
	}
	t.Cleanup(func() {
		noteDrops(t, n.Drops)
		n.Close()
	})
	return n
}

func wirePort(port uint16) uint16 { return bits.ReverseBytes16(port) }

func wireAddr(a netip.Addr) (w bpfAddr) {
	b := a.As16()
	for i := range w.W {
		w.W[i] = binary.LittleEndian.Uint32(b[4*i:])
	}
	return w
}

func (n *network) put(m *ebpf.Map, key, value any) {
	n.t.Helper()
	if err := m.Put(key, value); err != nil {
		n.t.Fatal(err)
	}
}

// hop adds a next hop and returns its row.
func (n *network) hop(ifindex uint32, mtu, vlan uint16) uint32 {
	n.t.Helper()
	row := n.hops
	n.hops++
	n.put(n.NextHops, row, bpfNextHop{Ifindex: ifindex, DstMac: workerMAC, SrcMac: ownMAC,
		Vlan: wirePort(vlan), Mtu: mtu})
	return row
}

// backend adds an active backend and returns its number.
func (n *network) backend(mode bpfMode, target netip.AddrPort, tunnel netip.Addr, row uint32) uint32 {
	n.t.Helper()
	number := n.backends
	n.backends++
	b := bpfBackend{Address: wireAddr(target.Addr()), Port: wirePort(target.Port()), Tunnel: wireAddr(tunnel),
		Tag: binary.LittleEndian.Uint64(testTag[:]), Mode: uint8(mode), Word: testWord(bpfBackendStateBACKEND_ACTIVE, row)}
	if tunnel.Is4() {
		proto := uint32(protoUDP)
		if mode == bpfModeMODE_IPIP {
			proto = 4
		}
		b.OuterSum = 0x45 + 0x40 + 64 + proto<<8 + b.Tunnel.W[3]>>16 + b.Tunnel.W[3]&0xffff
	}
	n.put(n.Backends, number, b)
	return number
}

const testGeneration = 7

func testWord(state bpfBackendState, row uint32) uint64 {
	return uint64(state)<<56 | testGeneration<<32 | uint64(row)
}

func (n *network) setState(number uint32, state bpfBackendState, row uint32) {
	n.t.Helper()
	var b bpfBackend
	if err := n.Backends.Lookup(number, &b); err != nil {
		n.t.Fatal(err)
	}
	b.Word = testWord(state, row)
	n.put(n.Backends, number, b)
}

// service adds a service whose 256 slots name the backends in turn; without
// backends it has no slots.
func (n *network) service(vip netip.Addr, port uint16, proto uint8, backends ...uint32) uint32 {
	n.t.Helper()
	number := n.services
	n.services++
	address := wireAddr(vip)
	n.put(n.bpfObjects.Services, bpfServiceKey{Vip: address}, uint32(0))
	n.put(n.bpfObjects.Services, bpfServiceKey{Vip: address, Port: wirePort(port), Proto: proto}, number)
	a := vip.As16()
	bit := (binary.LittleEndian.Uint64(a[:])*0x9e3779b97f4a7c15 + binary.LittleEndian.Uint64(a[8:])) *
		0xc2b2ae3d27d4eb4f >> (64 - 18)
	var word uint64
	if err := n.VipBits.Lookup(uint32(bit>>6), &word); err != nil {
		n.t.Fatal(err)
	}
	n.put(n.VipBits, uint32(bit>>6), word|1<<(bit&63))
	if len(backends) == 0 {
		n.put(n.ServiceWords, number, uint64(0))
		return number
	}
	n.put(n.ServiceWords, number, uint64(8)<<32|uint64(n.slots))
	for i := range uint32(256) {
		n.put(n.bpfObjects.Slots, n.slots+i, uint64(backends[int(i)%len(backends)]))
	}
	n.slots += 256
	return number
}

// run gives a frame to the XDP program, and returns what it does and the frame
// as it is then.
func (n *network) run(frame []byte) (uint32, []byte) {
	n.t.Helper()
	return n.runBy(n.FairleadXdp, frame)
}

func (n *network) runBy(program *ebpf.Program, frame []byte) (uint32, []byte) {
	n.t.Helper()
	opts := ebpf.RunOptions{Data: frame, DataOut: make([]byte, len(frame)+256)}
	action, err := program.Run(&opts)
	if err != nil {
		n.t.Fatal(err)
	}
	return action, opts.DataOut
}

// expect runs a frame and compares what comes out byte by byte.
func (n *network) expect(frame []byte, action uint32, want []byte) {
	n.t.Helper()
	got, out := n.run(frame)
	if got != action {
		n.t.Errorf("action %d, want %d; drops %v", got, action, noteDrops(n.t, n.Drops))
	}
	if want != nil && !bytes.Equal(out, want) {
		n.t.Errorf("frame\n%swant\n%s", hex.Dump(out), hex.Dump(want))
	}
}

// expectDrop runs a frame that is dropped, for one reason alone.
func (n *network) expectDrop(frame []byte, reason bpfDrop) {
	n.t.Helper()
	before := noteDrops(n.t, n.Drops)
	n.expect(frame, xdpDrop, nil)
	after := noteDrops(n.t, n.Drops)
	for drop := range bpfDropDROP_MAX {
		want := before[drop]
		if drop == reason {
			want++
		}
		if after[drop] != want {
			n.t.Errorf("drops[%d] = %d, want %d", drop, after[drop], want)
		}
	}
}

func (n *network) expectEvent(event bpfEvent, want uint64) {
	n.t.Helper()
	if got := perCPU(n.t, n.Events, uint32(event)); got != want {
		n.t.Errorf("events[%d] = %d, want %d", event, got, want)
	}
}

func (n *network) counter(m *ebpf.Map, number uint32) (sum bpfCounter) {
	n.t.Helper()
	var values []bpfCounter
	if err := m.Lookup(number, &values); err != nil {
		n.t.Fatal(err)
	}
	for _, v := range values {
		sum.Packets += v.Packets
		sum.Bytes += v.Bytes
		sum.Connections += v.Connections
	}
	return sum
}
