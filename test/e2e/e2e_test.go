// SPDX-License-Identifier: Apache-2.0

// Package e2e runs real agents on throwaway networks, with real kernels,
// clients and servers on every side.
package e2e

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"fairlead.dev/fairlead/internal/need"
	"fairlead.dev/fairlead/internal/testnet"
)

const patience = 5 * time.Second

var (
	vip4   = netip.MustParseAddr("192.0.2.10")
	vip6   = netip.MustParseAddr("2001:db8:f::10")
	both   = []netip.Addr{vip4, vip6}
	binary string
)

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "fairlead-e2e-")
	if err == nil {
		binary = filepath.Join(dir, "fairlead")
		var out []byte
		if out, err = exec.Command("go", "build", "-o", binary, "fairlead.dev/fairlead/cmd/fairlead").CombinedOutput(); err != nil {
			err = fmt.Errorf("%w: %s", err, out)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "build the program:", err)
		os.Exit(1)
	}
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

// network makes a network with running servers, agents and services.
func network(t *testing.T, nodes []testnet.NodeSpec, prepare func(*testnet.Network), services ...func(*testnet.Network) testnet.Service) *testnet.Network {
	t.Helper()
	return networkOf(t, testnet.Config{Nodes: nodes}, prepare, services...)
}

func networkOf(t *testing.T, config testnet.Config, prepare func(*testnet.Network), services ...func(*testnet.Network) testnet.Service) *testnet.Network {
	t.Helper()
	need.Root(t)
	n, err := testnet.New(config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.Close)
	for _, pod := range n.AllPods() {
		serve(t, pod.Namespace, 8080, 5353)
	}
	if prepare != nil {
		prepare(n)
	}
	must(t, n.WriteNodes())
	backends := 0
	for _, s := range services {
		service := s(n)
		backends = len(service.Pods) + len(service.Servers)
		must(t, n.WriteService(service))
	}
	must(t, n.StartAgents(binary))
	must(t, n.WaitProgrammed(backends, 60*time.Second))
	return n
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func web(n *testnet.Network) testnet.Service {
	return testnet.Service{Name: "web", VIPs: both, Port: 80, TargetPort: 8080, Protocol: "TCP", Pods: n.AllPods()}
}

func dns(n *testnet.Network) testnet.Service {
	return testnet.Service{Name: "dns", VIPs: both, Port: 53, TargetPort: 5353, Protocol: "UDP", Pods: n.AllPods()}
}

// serve answers in a namespace. By TCP: the first line is "who", answered with
// name and client; "put N", answered with the checksum of N bytes; or "get N",
// answered with N bytes. By UDP: name, client and the checksum of the datagram,
// and as many bytes again.
func serve(t *testing.T, n *testnet.Namespace, tcpPort, udpPort int) {
	t.Helper()
	var tcp net.Listener
	var udp net.PacketConn
	must(t, n.Do(func() (err error) {
		if tcp, err = net.Listen("tcp", fmt.Sprintf(":%d", tcpPort)); err != nil {
			return err
		}
		udp, err = net.ListenPacket("udp", fmt.Sprintf(":%d", udpPort))
		return err
	}))
	t.Cleanup(func() { tcp.Close(); udp.Close() })
	go func() {
		for {
			c, err := tcp.Accept()
			if err != nil {
				return
			}
			go answer(c, n.Label)
		}
	}()
	go func() {
		buffer := make([]byte, 65536)
		for {
			size, from, err := udp.ReadFrom(buffer)
			if err != nil {
				return
			}
			sum := sha256.Sum256(buffer[:size])
			reply := fmt.Appendf(nil, "%s %s %x\n", n.Label, host(from), sum)
			_, _ = udp.WriteTo(append(reply, make([]byte, max(0, size-len(reply)))...), from)
		}
	}()
}

func host(a net.Addr) string {
	return netip.MustParseAddrPort(a.String()).Addr().Unmap().String()
}

func answer(c net.Conn, name string) {
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(2 * time.Minute))
	var command string
	var size int64
	line, err := readLine(c)
	if err != nil {
		return
	}
	if _, err := fmt.Sscan(line, &command, &size); err != nil {
		command = line
	}
	switch command {
	case "put":
		sum := sha256.New()
		if _, err := io.CopyN(sum, c, size); err == nil {
			fmt.Fprintf(c, "%x\n", sum.Sum(nil))
		}
	case "get":
		_, _ = io.CopyN(c, stream(), size)
	default:
		fmt.Fprintf(c, "%s %s\n", name, host(c.RemoteAddr()))
	}
}

// stream is the same endless bytes for everyone.
func stream() io.Reader { return rand.NewChaCha8([32]byte{1}) }

func readLine(r io.Reader) (string, error) {
	var line []byte
	for b := make([]byte, 1); len(line) < 256; line = append(line, b[0]) {
		if _, err := io.ReadFull(r, b); err != nil {
			return "", err
		}
		if b[0] == '\n' {
			return string(line), nil
		}
	}
	return "", errors.New("the line is too long")
}

func dial(n *testnet.Namespace, protocol string, vip netip.Addr, port uint16) (c net.Conn, err error) {
	return dialWithin(n, protocol, vip, port, patience)
}

func dialWithin(n *testnet.Namespace, protocol string, vip netip.Addr, port uint16, limit time.Duration) (c net.Conn, err error) {
	err = n.Do(func() error {
		ctx, cancel := context.WithTimeout(context.Background(), limit)
		defer cancel()
		c, err = (&net.Dialer{}).DialContext(ctx, protocol, netip.AddrPortFrom(vip, port).String())
		return err
	})
	return c, err
}

// who asks by a connection of its own, and returns who answered and whom it saw.
func who(n *testnet.Namespace, vip netip.Addr) (server, client string, err error) {
	c, err := dial(n, "tcp", vip, 80)
	if err != nil {
		return "", "", err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return "", "", err
	}
	if _, err := io.WriteString(c, "who\n"); err != nil {
		return "", "", err
	}
	line, err := readLine(c)
	server, client, _ = strings.Cut(line, " ")
	return server, client, err
}

func clientOf(vip netip.Addr) string {
	if vip.Is4() {
		return testnet.Client4.String()
	}
	return testnet.Client6.String()
}

// requests makes many, and checks that all are answered, by all servers, who
// see the client's address.
func requests(t *testing.T, n *testnet.Network, count, servers int) {
	t.Helper()
	for _, vip := range both {
		seen := map[string]int{}
		for range count {
			server, client, err := who(n.Client, vip)
			if err != nil {
				t.Fatalf("%s: %v", vip, err)
			}
			if client != clientOf(vip) {
				t.Fatalf("%s: the server saw %s", vip, client)
			}
			seen[server]++
		}
		if len(seen) != servers {
			t.Errorf("%s: %d servers answered, want %d: %v", vip, len(seen), servers, seen)
		}
	}
}

// direct checks that no answer went through an LB node.
func direct(t *testing.T, n *testnet.Network) {
	t.Helper()
	for _, node := range n.LoadBalancers() {
		sight, err := n.Watch.See(node)
		must(t, err)
		if sight.AnswersTo+sight.AnswersFrom > 0 && !node.Backend {
			t.Errorf("%d answers through %s", sight.AnswersTo+sight.AnswersFrom, node.Name())
		}
	}
}

// exchange sends a datagram of a size and checks the answer.
func exchange(n *testnet.Namespace, vip netip.Addr, size int) error {
	c, err := dial(n, "udp", vip, 53)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(time.Second)); err != nil {
		return err
	}
	data := make([]byte, size)
	_, _ = io.ReadFull(stream(), data)
	if _, err := c.Write(data); err != nil {
		return err
	}
	buffer := make([]byte, 65536)
	got, err := c.Read(buffer)
	if err != nil {
		return err
	}
	sum := sha256.Sum256(data)
	fields := strings.Fields(strings.SplitN(string(buffer[:got]), "\n", 2)[0])
	if len(fields) != 3 || fields[1] != clientOf(vip) || fields[2] != hex.EncodeToString(sum[:]) {
		return fmt.Errorf("answer %q", fields)
	}
	if got < size {
		return fmt.Errorf("%d bytes of answer to %d", got, size)
	}
	return nil
}

// drops is how many packets a node dropped for a reason.
func drops(t *testing.T, n *testnet.Node, reason string) uint64 {
	t.Helper()
	d, err := n.Status()
	must(t, err)
	for _, c := range d.Drops {
		if c.Name == reason {
			return c.Count
		}
	}
	return 0
}

// stillAnswer asks over each connection that was made before.
func stillAnswer(t *testing.T, held []net.Conn) {
	t.Helper()
	for i, c := range held {
		must(t, c.SetDeadline(time.Now().Add(patience)))
		_, err := io.WriteString(c, "who\n")
		if err == nil {
			_, err = readLine(c)
		}
		if err != nil {
			t.Errorf("connection %d broke: %v", i, err)
		}
	}
}

// holdVIPs readies a server that has the VIPs itself, on a LAN with others that
// have them too: it takes their packets and does not answer ARP for them.
func holdVIPs(t *testing.T, node *testnet.Node) {
	t.Helper()
	must(t, node.Sysctl(map[string]string{"ipv4/conf/all/arp_ignore": "1", "ipv4/conf/all/arp_announce": "2"}))
	for _, vip := range both {
		must(t, node.AddAddress("lo", hostPrefix(vip)))
	}
}
