// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"fairlead.dev/fairlead/internal/testnet"
)

const (
	echoPort  = 7000
	stall     = time.Second // that none may take longer than
	giveUp    = 8 * time.Second
	namesHere = 64
)

// conversations is how many there are by TCP; by UDP a fifth.
var conversations = flag.Int("conversations", 300, "how many TCP conversations outlive changes; `go test ./test/e2e -args -conversations=5000`")

// seconds is how long 20 changes a second go on.
var seconds = flag.Int("seconds", 5, "how long 20 changes a second go on")

// beat is the time between the messages of a conversation: 6,000 are said in a
// second.
func beat() time.Duration { return time.Duration(*conversations) * time.Second / 6000 }

// echo answers each message, by TCP and UDP, with the Pod's name before it.
func echo(t *testing.T, n *testnet.Namespace) {
	t.Helper()
	echoLines(t, n)
	echoDatagrams(t, n, "")
}

func echoLines(t *testing.T, n *testnet.Namespace) {
	t.Helper()
	var tcp net.Listener
	must(t, n.Do(func() (err error) {
		tcp, err = net.Listen("tcp", fmt.Sprintf(":%d", echoPort))
		return err
	}))
	t.Cleanup(func() { tcp.Close() })
	go func() {
		for {
			c, err := tcp.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				for lines := bufio.NewScanner(c); lines.Scan(); {
					if _, err := fmt.Fprintf(c, "%s %s\n", n.Label, lines.Text()); err != nil {
						return
					}
				}
			}()
		}
	}()
}

// echoDatagrams answers at an address: a server that holds the VIP would answer
// from another else. "" is any.
func echoDatagrams(t *testing.T, n *testnet.Namespace, address string) {
	t.Helper()
	var udp net.PacketConn
	must(t, n.Do(func() (err error) {
		udp, err = net.ListenPacket("udp", net.JoinHostPort(address, fmt.Sprint(echoPort)))
		return err
	}))
	t.Cleanup(func() { udp.Close() })
	go func() {
		message := make([]byte, namesHere)
		for {
			size, from, err := udp.ReadFrom(message)
			if err != nil {
				return
			}
			_, _ = udp.WriteTo(append([]byte(n.Label+" "), message[:size]...), from)
		}
	}()
}

// talks are conversations that go on while things change.
type talks struct {
	mu      sync.Mutex
	results map[string][]string // what went wrong, by kind
	served  map[string]int      // Pods, and how many conversations began there
	open    int
	cancel  context.CancelFunc
	running sync.WaitGroup
}

// startTalks opens n conversations, of both families in turn.
func startTalks(t *testing.T, from *testnet.Namespace, protocol string, n int) *talks {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	w := &talks{results: map[string][]string{}, served: map[string]int{}, cancel: cancel}
	for i := range n {
		var c net.Conn
		must(t, from.Do(func() (err error) {
			dialer := net.Dialer{Timeout: giveUp}
			c, err = dialer.Dial(protocol, netip.AddrPortFrom(both[i%2], echoPort).String())
			return err
		}))
		w.open++
		w.running.Go(func() {
			defer c.Close()
			time.Sleep(rand.N(beat()))
			w.talk(ctx, c, protocol)
		})
	}
	return w
}

func (w *talks) wrong(kind, detail string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.results[kind] = append(w.results[kind], detail)
}

// talk sends numbered messages until ctx ends; each must come back in time, and
// from the Pod that answered the first.
func (w *talks) talk(ctx context.Context, c net.Conn, protocol string) {
	pod, reader := "", bufio.NewReader(c)
	for n := 0; ctx.Err() == nil; n++ {
		sent := time.Now()
		name, err := w.say(c, reader, protocol, n)
		if err != nil {
			w.wrong("broken", fmt.Sprintf("%s to %s, message %d, after %s: %v", c.LocalAddr(), pod, n, time.Since(sent).Round(time.Millisecond), err))
			return
		}
		if took := time.Since(sent); took > stall {
			w.wrong("stalled", fmt.Sprintf("%s to %s, message %d: %s", c.LocalAddr(), pod, n, took.Round(time.Millisecond)))
		}
		if pod == "" {
			pod = name
			w.mu.Lock()
			w.served[pod]++
			w.mu.Unlock()
		}
		if name != pod {
			w.wrong("moved", fmt.Sprintf("%s from %s to %s", c.LocalAddr(), pod, name))
			return
		}
		select {
		case <-ctx.Done():
		case <-time.After(beat()):
		}
	}
}

// say sends one message and returns who answers it. Datagrams are repeated.
func (w *talks) say(c net.Conn, reader *bufio.Reader, protocol string, n int) (pod string, err error) {
	message := fmt.Sprintf("message %d\n", n)
	deadline := time.Now().Add(giveUp)
	for {
		if _, err := c.Write([]byte(message)); err != nil {
			return "", err
		}
		wait := deadline
		if protocol == "udp" {
			if wait = time.Now().Add(300 * time.Millisecond); wait.After(deadline) {
				wait = deadline
			}
		}
		if err := c.SetReadDeadline(wait); err != nil {
			return "", err
		}
		for {
			line, err := reader.ReadString('\n')
			if err != nil {
				if protocol == "udp" && time.Now().Before(deadline) {
					break // send it again
				}
				return "", err
			}
			if name, rest, _ := strings.Cut(line, " "); rest == message {
				return name, nil
			}
			if protocol == "tcp" {
				return "", fmt.Errorf("answered %q", line)
			}
		}
	}
}

// stop ends the conversations and returns how many went wrong, by kind.
func (w *talks) stop() (wrong int, summary string) {
	w.cancel()
	w.running.Wait()
	for kind, of := range w.results {
		wrong += len(of)
		summary += fmt.Sprintf("%d %s, e.g. %s; ", len(of), kind, of[0])
	}
	return wrong, fmt.Sprintf("%d conversations with %d Pods: %s", w.open, len(w.served), summary)
}

func echoes(protocol string, active, draining []*testnet.Pod) testnet.Service {
	return testnet.Service{Name: "echo-" + strings.ToLower(protocol), VIPs: both, Port: echoPort, TargetPort: echoPort, Protocol: protocol,
		Pods: active, Draining: draining}
}

// changing is a network with an echo service of each protocol.
func changing(t *testing.T, pods int, extra string) *testnet.Network {
	t.Helper()
	var nodes []testnet.NodeSpec
	for i := range 3 {
		nodes = append(nodes, testnet.NodeSpec{Name: fmt.Sprintf("lb-%d", i+1), LoadBalancer: true, Agent: true, Extra: extra})
	}
	for i := range 3 {
		nodes = append(nodes, testnet.NodeSpec{Name: fmt.Sprintf("worker-%d", i+1), Backend: true, Pods: pods, Agent: true})
	}
	return network(t, nodes, func(n *testnet.Network) {
		for _, pod := range n.AllPods() {
			echo(t, pod.Namespace)
		}
	}, func(n *testnet.Network) testnet.Service { return echoes("TCP", n.AllPods(), nil) },
		func(n *testnet.Network) testnet.Service { return echoes("UDP", n.AllPods(), nil) })
}

// churn makes random halves of the Pods take new flows, one after the other.
func churn(t *testing.T, n *testnet.Network, times int, pause time.Duration) {
	t.Helper()
	random := rand.New(rand.NewPCG(7, rand.Uint64()))
	for range times {
		var active, draining []*testnet.Pod
		for _, i := range random.Perm(len(n.AllPods())) {
			if len(active) == 0 || random.IntN(2) == 0 {
				active = append(active, n.AllPods()[i])
			} else {
				draining = append(draining, n.AllPods()[i])
			}
		}
		must(t, n.WriteService(echoes("TCP", active, draining)))
		must(t, n.WriteService(echoes("UDP", active, draining)))
		time.Sleep(pause)
	}
}

// Connections and UDP flows outlive every change of who takes new ones.
func TestConversationsOutliveChanges(t *testing.T) {
	n := changing(t, 3, "")
	tcp := startTalks(t, n.Client, "tcp", *conversations)
	udp := startTalks(t, n.Client, "udp", *conversations/5)
	churn(t, n, 10, 300*time.Millisecond)
	churn(t, n, 20**seconds, 50*time.Millisecond) // 20 changes a second
	for protocol, w := range map[string]*talks{"tcp": tcp, "udp": udp} {
		if wrong, summary := w.stop(); wrong > 0 {
			t.Errorf("%s: %s", protocol, summary)
		} else {
			t.Logf("%s: %s", protocol, summary)
		}
	}
}

// From 3 Pods to 30 and back, tables resized each time; those that leave serve
// what they have.
func TestConversationsOutliveScaling(t *testing.T) {
	n := changing(t, 10, "")
	all := n.AllPods()
	scale := func(active int) {
		must(t, n.WriteService(echoes("TCP", all[:active], all[active:])))
		must(t, n.WriteService(echoes("UDP", all[:active], all[active:])))
		time.Sleep(2 * time.Second)
	}
	scale(3)
	var talking []*talks
	for _, active := range []int{30, 3, 30, 3} {
		talking = append(talking, startTalks(t, n.Client, "tcp", *conversations/4), startTalks(t, n.Client, "udp", *conversations/20))
		scale(active)
	}
	for _, w := range talking {
		if wrong, summary := w.stop(); wrong > 0 {
			t.Error(summary)
		}
	}
}

// And every loss and restart of who forwards them, while changes go on.
func TestConversationsOutliveNodes(t *testing.T) {
	n := changing(t, 3, "")
	lbs := n.LoadBalancers()
	restart := func(nodes ...*testnet.Node) {
		for _, node := range nodes {
			node.AgentProcess().Kill()
		}
		for _, node := range nodes {
			must(t, node.StartAgent(binary))
		}
	}
	tcp := startTalks(t, n.Client, "tcp", *conversations)
	udp := startTalks(t, n.Client, "udp", *conversations/5)
	for _, event := range []func(){
		func() { must(t, n.SpreadOver(lbs[1:]...)) },        // a node is lost
		func() { restart(lbs[0]) },                          // and begins anew, with what it sees now
		func() { must(t, n.SpreadOver(lbs...)) },            // and is back
		func() { restart(lbs[1]) },                          // an agent crashes
		func() { must(t, n.SpreadOver(lbs[0])) },            // all but one are lost
		func() { restart(n.Backends()[0]) },                 // an agent of a worker crashes
		func() { must(t, n.SpreadOver(lbs[2], lbs[1])) },    // and that one too
		func() { restart(lbs...) },                          // all LB nodes' agents crash at once
		func() { restart(append(lbs, n.Backends()...)...) }, // all agents do
		func() { must(t, n.SpreadOver(lbs...)) },            // all are back
	} {
		event()
		churn(t, n, 3, 300*time.Millisecond)
	}
	must(t, n.WaitProgrammed(len(n.AllPods()), 30*time.Second))
	for protocol, w := range map[string]*talks{"tcp": tcp, "udp": udp} {
		if wrong, summary := w.stop(); wrong > 0 {
			t.Errorf("%s: %s", protocol, summary)
		} else {
			t.Logf("%s: %s", protocol, summary)
		}
	}
}

// The control: without asking, the same changes break conversations; else the
// test above proves nothing.
func TestChangesBreakAPureHash(t *testing.T) {
	n := changing(t, 3, "pureHash: true\n")
	tcp := startTalks(t, n.Client, "tcp", 100)
	churn(t, n, 6, 300*time.Millisecond)
	wrong, summary := tcp.stop()
	t.Log(summary)
	if wrong == 0 {
		t.Error("nothing broke without asking")
	}
}

// Servers that nobody can be asked about: what began while their slots were
// contested outlives the LB node that recorded it, since the others were told.
func TestRecordsOutliveAnLBNode(t *testing.T) {
	nodes := testnet.DefaultNodes()
	for i := range nodes {
		nodes[i].Pods, nodes[i].Agent = 0, nodes[i].LoadBalancer || nodes[i].Backend
	}
	n := network(t, nodes, func(n *testnet.Network) {
		for _, node := range n.Backends() {
			holdVIPs(t, node)
			echo(t, node.Namespace)
		}
	}, func(n *testnet.Network) testnet.Service {
		return testnet.Service{Name: "held", VIPs: both, Port: echoPort, TargetPort: echoPort, Protocol: "TCP", Mode: "IPIP", Servers: n.Backends()}
	})
	lbs, servers := n.LoadBalancers(), n.Backends()
	must(t, n.SpreadOver(lbs[0]))
	before := startTalks(t, n.Client, "tcp", 100)
	must(t, n.WriteService(testnet.Service{Name: "held", VIPs: both, Port: echoPort, TargetPort: echoPort, Protocol: "TCP", Mode: "IPIP",
		Servers: servers[1:], Leaving: servers[:1]}))
	time.Sleep(time.Second)
	since := startTalks(t, n.Client, "tcp", 200) // recorded where their slots are contested
	time.Sleep(2 * time.Second)
	must(t, n.SpreadOver(lbs[1], lbs[2])) // the one that recorded them is lost
	time.Sleep(2 * time.Second)
	for name, w := range map[string]*talks{"before the change": before, "since": since} {
		if wrong, summary := w.stop(); wrong > 0 {
			t.Errorf("%s: %s", name, summary)
		}
	}
	if since.served[servers[0].Name()] > 0 {
		t.Error("new connections to a server that leaves")
	}
}

// Agents that crash again and again, start with objects that are bad or gone,
// or lose their pins: forwarding goes on, and in the end each hook has one
// program.
func TestConversationsOutliveBadStarts(t *testing.T) {
	n := changing(t, 2, "")
	tcp := startTalks(t, n.Client, "tcp", 200)
	random := rand.New(rand.NewPCG(11, 12))
	for range 8 {
		for _, node := range n.Nodes {
			node.AgentProcess().Kill()
			must(t, node.StartAgent(binary))
		}
		time.Sleep(time.Duration(random.IntN(300)) * time.Millisecond)
	}
	must(t, n.WaitProgrammed(len(n.AllPods()), 30*time.Second))

	lb := n.LoadBalancers()[0]
	must(t, n.WriteObjects("bad.yaml", "kind: Sevrice\n"))
	lb.AgentProcess().Kill()
	must(t, lb.StartAgent(binary))
	time.Sleep(time.Second)
	if d, err := lb.Status(); err != nil || d.Programmed || d.Problem == "" || len(d.Findings) == 0 {
		t.Errorf("with bad objects: programmed %v, %q, %v, %v", d.Programmed, d.Problem, d.Findings, err)
	}
	must(t, os.Remove(filepath.Join(n.ObjectsDir(), "bad.yaml")))
	must(t, n.WaitProgrammed(len(n.AllPods()), 30*time.Second))

	must(t, os.Rename(n.ObjectsDir(), n.ObjectsDir()+".gone"))
	lb.AgentProcess().Kill()
	must(t, lb.StartAgent(binary))
	time.Sleep(time.Second)
	must(t, os.Rename(n.ObjectsDir()+".gone", n.ObjectsDir()))
	must(t, n.WaitProgrammed(len(n.AllPods()), 30*time.Second))

	_, err := lb.Run("sh", "-c", "rm /sys/fs/bpf/fairlead/*")
	must(t, err)
	churn(t, n, 2, 500*time.Millisecond)
	lb.AgentProcess().Kill()
	time.Sleep(500 * time.Millisecond)
	must(t, lb.StartAgent(binary))
	must(t, n.WaitProgrammed(len(n.AllPods()), 30*time.Second))
	if wrong, summary := tcp.stop(); wrong > 0 {
		t.Error(summary)
	}
	pins, err := lb.Run("sh", "-c", "ls /sys/fs/bpf/fairlead | grep -c ^xdp-")
	if err != nil || strings.TrimSpace(pins) != "1" {
		t.Errorf("XDP is attached %q times, %v", pins, err)
	}
}

// By hand: simulate tells what a change would do, and a backend that is drained
// keeps what it has, says how much that is, and is done when it has nothing.
func TestSimulateAndDrain(t *testing.T) {
	n := changing(t, 2, "")
	lb, pod := n.LoadBalancers()[0], n.AllPods()[0]
	run := func(args ...string) string {
		t.Helper()
		out, err := lb.Run(binary, append(args, "--socket", lb.Socket())...)
		must(t, err)
		return out
	}
	must(t, n.SpreadOver(lb))
	tcp := startTalks(t, n.Client, "tcp", 100)
	time.Sleep(time.Second)
	out := run("simulate", n.ObjectsDir())
	if !strings.Contains(out, "0.0%") || strings.Contains(out, "go, and their flows") {
		t.Errorf("simulating what is in force:\n%s", out)
	}
	run("drain", pod.Address4.String(), "--no-wait")
	run("drain", pod.Address6.String(), "--no-wait")
	time.Sleep(7 * time.Second)
	d, err := lb.Status()
	must(t, err)
	owned := uint32(0)
	for _, s := range d.Services {
		for _, b := range s.Backends {
			if b.State == "draining" && s.Protocol == "TCP" && b.Flows != nil {
				owned += *b.Flows
			}
		}
	}
	wrong, summary := tcp.stop()
	if wrong > 0 {
		t.Error(summary)
	}
	if want := uint32(tcp.served[pod.Label]); owned != want || want == 0 {
		t.Errorf("%d flows left are told, and the Pod had %d", owned, want)
	}
	if out := run("drain", pod.Address4.String(), "--timeout", "25s"); !strings.Contains(out, " 0 flows left") {
		t.Errorf("draining ended with:\n%s", out)
	}
}

// The same with hints for a tenth of the flows alone, and while a stranger
// sends SYNs from made-up addresses as fast as it can.
func TestConversationsOutliveAFlood(t *testing.T) {
	n := changing(t, 3, "limits: {hints: 32, slots: 262144, candidates: 65536, services: 1024, backends: 1024, flows: 65536}\n")
	tcp := startTalks(t, n.Client, "tcp", *conversations)
	ctx, stop := context.WithTimeout(context.Background(), 20*time.Second)
	flooded := make(chan int)
	go func() { flooded <- flood(ctx, n.Stranger) }()
	churn(t, n, 12, 400*time.Millisecond)
	stop()
	t.Logf("%d SYNs from made-up addresses", <-flooded)
	wrong, summary := tcp.stop()
	t.Log(summary)
	// The flood takes the processors that everybody here shares: who waits for
	// them is told, and is no failure.
	if wrong > len(tcp.results["stalled"]) {
		t.Error(summary)
	}
}

// flood sends SYNs to the VIP until ctx ends, and returns how many.
func flood(ctx context.Context, from *testnet.Namespace) (sent int) {
	random := rand.New(rand.NewPCG(9, 10))
	syn := make([]byte, 20)
	syn[2], syn[3], syn[12], syn[13] = echoPort>>8, echoPort&0xff, 5<<4, 2
	for ctx.Err() == nil {
		var packets [][]byte
		for range 500 {
			syn[0], syn[1] = byte(random.Uint32()), byte(random.Uint32())
			src := netip.AddrFrom4([4]byte{100, 64 + byte(random.IntN(64)), byte(random.Uint32()), byte(random.Uint32())})
			packets = append(packets, packet4(src, vip4, 6, syn))
		}
		if raw(from, packets...) == nil {
			sent += len(packets)
		}
	}
	return sent
}
