// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"crypto/sha256"
	bytesof "encoding/binary"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"fairlead.dev/fairlead/internal/testnet"
)

// transfer sends bytes to a VIP, or fetches them, and checks them.
func transfer(t *testing.T, n *testnet.Network, vip netip.Addr, command string, size int64) {
	t.Helper()
	c, err := dial(n.Client, "tcp", vip, 80)
	must(t, err)
	defer c.Close()
	must(t, c.SetDeadline(time.Now().Add(time.Minute)))
	fmt.Fprintf(c, "%s %d\n", command, size)
	sent, got := sha256.New(), ""
	if command == "put" {
		_, err = io.CopyN(io.MultiWriter(c, sent), stream(), size)
		must(t, err)
		got, err = readLine(c)
		must(t, err)
	} else {
		back := sha256.New()
		_, err = io.CopyN(back, c, size)
		must(t, err)
		_, _ = io.CopyN(sent, stream(), size)
		got = fmt.Sprintf("%x", back.Sum(nil))
	}
	if want := fmt.Sprintf("%x", sent.Sum(nil)); got != want {
		t.Errorf("%s %s: %s arrived, want %s", command, vip, got, want)
	}
}

func events(t *testing.T, nodes []*testnet.Node, name string) (sum uint64) {
	t.Helper()
	for _, node := range nodes {
		d, err := node.Status()
		must(t, err)
		for _, e := range d.Events {
			if e.Name == name {
				sum += e.Count
			}
		}
	}
	return sum
}

// What does not fit the way to a worker is told to the client by the LB node;
// what does not fit the way to the client is told to the Pod by a router, and
// finds it by way of the VIP.
func TestPathMTU(t *testing.T) {
	nodes := testnet.DefaultNodes()
	for i := range nodes {
		if nodes[i].LoadBalancer {
			nodes[i].MTU = 1400
		}
	}
	n := network(t, nodes, nil, web)
	for _, vip := range both {
		transfer(t, n, vip, "put", 4<<20)
	}
	if events(t, n.LoadBalancers(), "too_big") == 0 {
		t.Error("no LB node said that a packet is too big")
	}
	must(t, n.Router.SetMTU("to-client", 1280))
	for _, vip := range both {
		transfer(t, n, vip, "get", 4<<20)
	}
	for _, counter := range []string{"Icmp.OutDestUnreachs", "Icmp6OutPktTooBigs"} {
		told, err := n.Router.Snmp(counter)
		must(t, err)
		if told == 0 {
			t.Errorf("%s is 0: the router had nothing to say", counter)
		}
	}
}

func TestTaggedUplinks(t *testing.T) {
	nodes := testnet.DefaultNodes()
	for i := range nodes {
		nodes[i].VLAN = uint16(5 + i)
	}
	n := network(t, nodes, nil, web)
	requests(t, n, 200, 8)
	for _, vip := range both {
		transfer(t, n, vip, "put", 1<<20)
	}
}

func TestJumboUnderlay(t *testing.T) {
	nodes := testnet.DefaultNodes()
	for i := range nodes {
		nodes[i].MTU = 9000
	}
	n := network(t, nodes, nil, web, dns)
	must(t, n.Router.SetMTU("to-client", 9000))
	must(t, n.Client.SetMTU(testnet.Uplink, 9000))
	for _, vip := range both {
		for range 20 {
			if err := exchange(n.Client, vip, 8000); err != nil {
				t.Fatalf("%s: %v", vip, err)
			}
		}
		transfer(t, n, vip, "put", 64<<20)
		transfer(t, n, vip, "get", 64<<20)
	}
	requests(t, n, 100, 8)
}

// IPv4 to workers whose nodes have IPv6 addresses alone.
func TestIPv4InIPv6(t *testing.T) {
	n := network(t, testnet.DefaultNodes(), nil, web)
	path := filepath.Join(n.ObjectsDir(), "nodes.yaml")
	text, err := os.ReadFile(path)
	must(t, err)
	edited := string(text)
	for _, worker := range n.Backends() {
		edited = strings.Replace(edited, fmt.Sprintf("[%q, %q]", worker.Address4, worker.Address6), fmt.Sprintf("[%q]", worker.Address6), 1)
	}
	must(t, n.WriteObjects("nodes.yaml", edited))
	for _, lb := range n.LoadBalancers() {
		for deadline := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
			d, err := lb.Status()
			must(t, err)
			over4 := 0
			for _, s := range d.Services {
				for _, b := range s.Backends {
					over4 += strings.Count(b.Tunnel, ".")
				}
			}
			if over4 == 0 && d.Programmed && len(d.Unresolved) == 0 {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s still uses IPv4 tunnels", lb.Name())
			}
		}
	}
	requests(t, n, 200, 8)
	transfer(t, n, vip4, "put", 4<<20)
	transfer(t, n, vip4, "get", 4<<20)
}

// An LB node's own services, and all else that is for no VIP, are as they were.
func TestOtherTrafficOfAnLBNode(t *testing.T) {
	n := network(t, testnet.DefaultNodes(), func(n *testnet.Network) {
		serve(t, n.LoadBalancers()[0].Namespace, 80, 53)
	}, web, dns)
	lb := n.LoadBalancers()[0]
	for _, own := range []netip.Addr{lb.Address4, lb.Address6} {
		for range 50 {
			server, client, err := who(n.Client, own)
			if err != nil || server != lb.Name() || client != clientOf(own) {
				t.Fatalf("%s: %s saw %s, %v", own, server, client, err)
			}
			if err := exchange(n.Client, own, 1000); err != nil {
				t.Fatalf("%s: %v", own, err)
			}
		}
	}
	requests(t, n, 150, 8)
}

// A program of somebody else's is not replaced; the agent says what to do, and
// begins when it is done.
func TestForeignProgram(t *testing.T) {
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.XDP, Name: "somebody_elses", License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 2), asm.Return()}})
	must(t, err)
	defer program.Close()
	n, err := testnet.New(testnet.Config{Nodes: testnet.DefaultNodes()})
	must(t, err)
	t.Cleanup(n.Close)
	for _, pod := range n.AllPods() {
		serve(t, pod.Namespace, 8080, 5353)
	}
	node := n.LoadBalancers()[0]
	uplink, err := node.Netlink.LinkByName(testnet.Uplink)
	must(t, err)
	set := func(fd int) {
		must(t, node.Do(func() error { return netlink.LinkSetXdpFd(uplink, fd) }))
	}
	set(program.FD())
	must(t, n.WriteNodes())
	must(t, n.WriteService(web(n)))
	must(t, node.StartAgent(binary))
	deadline := time.Now().Add(30 * time.Second)
	for !strings.Contains(node.AgentProcess().Log.String(), "already carries XDP program") {
		if time.Now().After(deadline) {
			t.Fatalf("no word of the program: %s", node.AgentProcess().Log)
		}
		time.Sleep(50 * time.Millisecond)
	}
	for _, part := range []string{"somebody_elses", "ip link set dev eth0 xdp off"} {
		if !strings.Contains(node.AgentProcess().Log.String(), part) {
			t.Errorf("the log does not say %q: %s", part, node.AgentProcess().Log)
		}
	}
	uplink, err = node.Netlink.LinkByName(testnet.Uplink)
	must(t, err)
	info, err := program.Info()
	must(t, err)
	if id, _ := info.ID(); uplink.Attrs().Xdp == nil || uplink.Attrs().Xdp.ProgId != uint32(id) {
		t.Errorf("the program was replaced: %+v", uplink.Attrs().Xdp)
	}
	set(-1)
	for _, other := range n.Nodes {
		if other != node {
			must(t, other.StartAgent(binary))
		}
	}
	must(t, n.WaitProgrammed(8, 60*time.Second))
	requests(t, n, 150, 8)
}

// raw sends whole IPv4 packets, whoever their source says that they are from.
func raw(n *testnet.Namespace, packets ...[]byte) error {
	return n.Do(func() error {
		socket, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_RAW)
		if err != nil {
			return err
		}
		defer unix.Close(socket)
		for _, p := range packets {
			if err := unix.Sendto(socket, p, 0, &unix.SockaddrInet4{Addr: [4]byte(p[16:20])}); err != nil {
				return err
			}
		}
		return nil
	})
}

// packet4 is an IPv4 packet; the kernel fills in its checksum.
func packet4(src, dst netip.Addr, proto byte, payload []byte) []byte {
	p := make([]byte, 20, 20+len(payload))
	p[0], p[8], p[9] = 0x45, 64, proto
	bytesof.BigEndian.PutUint16(p[2:], uint16(20+len(payload)))
	copy(p[12:], src.AsSlice())
	copy(p[16:], dst.AsSlice())
	return append(p, payload...)
}

// geneve is a tunnel packet like an LB node's, but for the tag, which nobody
// else knows.
func geneve(verb byte, target netip.AddrPort, inner []byte) []byte {
	be := bytesof.BigEndian
	b := be.AppendUint16(nil, 50000)
	b = be.AppendUint16(b, testnet.GenevePort)
	b = be.AppendUint16(b, uint16(8+8+4+32+4+len(inner)))
	b = append(b, 0, 0, 1+36/4, 0x40)
	b = be.AppendUint16(b, 0x0800)
	b = be.AppendUint32(b, testnet.VNI<<8)
	b = be.AppendUint16(b, 0xff4c)
	b = append(b, 0x81, 36/4, 1, verb, 1, 4)
	b = be.AppendUint16(b, target.Port())
	b = append(b, make([]byte, 2+4+4+8+8)...)
	b = append(b, target.Addr().AsSlice()...)
	return append(b, inner...)
}

// Orders, questions and bounces that are well made, in every way that they can be sent: from
// the sender's own address and from an LB node's, as Geneve and as IP in IP.
func TestForgedTunnels(t *testing.T) {
	n := network(t, testnet.DefaultNodes(), nil, web)
	worker, lb, foreign := n.Backends()[0], n.LoadBalancers()[0], n.Backends()[1]
	target := netip.AddrPortFrom(worker.Pods[0].Address4, 8080)
	syn := make([]byte, 20)
	bytesof.BigEndian.PutUint16(syn, 4321)
	bytesof.BigEndian.PutUint16(syn[2:], 80)
	syn[12], syn[13] = 5<<4, 2
	inner := packet4(testnet.Client4, vip4, 6, syn)
	before := events(t, n.Backends(), "delivered") + events(t, n.Backends(), "flow_new")
	for name, from := range map[string]struct {
		at  *testnet.Namespace
		own netip.Addr
	}{
		"stranger": {n.Stranger, testnet.Stranger4}, "client": {n.Client, testnet.Client4},
		"pod": {foreign.Pods[0].Namespace, foreign.Pods[0].Address4},
	} {
		for _, src := range []netip.Addr{from.own, lb.Address4} {
			packets := [][]byte{packet4(src, worker.Address4, 4, inner), packet4(src, worker.Address4, 41, inner)}
			for verb := range byte(3) { // an order, a question, a bounce
				packets = append(packets, packet4(src, worker.Address4, 17, geneve(1+verb, target, inner)))
			}
			packets = append(packets, packet4(src, lb.Address4, 17, geneve(3, target, inner)))
			if err := raw(from.at, packets...); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
		}
	}
	for _, c := range []struct {
		at     *testnet.Node
		reason string
		count  uint64
	}{{worker, "tunnel_source", 10}, {worker, "tunnel_tag", 6}, {worker, "tunnel_pod", 2}, {lb, "tunnel_bounce", 2}} {
		for deadline := time.Now().Add(patience); drops(t, c.at, c.reason) < c.count; time.Sleep(50 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Errorf("%s at %s: %d dropped, want %d", c.reason, c.at.Name(), drops(t, c.at, c.reason), c.count)
				break
			}
		}
	}
	if got := drops(t, foreign, "from_pod_tunnel"); got < 6 {
		t.Errorf("%d of the Pod's tunnel packets were dropped on its node", got)
	}
	if after := events(t, n.Backends(), "delivered") + events(t, n.Backends(), "flow_new"); after != before {
		t.Errorf("%d things were delivered", after-before)
	}
	if server, _, err := who(n.Client, vip4); err != nil {
		t.Errorf("%s %v", server, err)
	}
}
