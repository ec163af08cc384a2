// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"fairlead.dev/fairlead/internal/file"
	"fairlead.dev/fairlead/internal/maglev"
	"fairlead.dev/fairlead/internal/need"
	"fairlead.dev/fairlead/internal/testnet"
)

// program builds the agent, once.
var program = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "fairlead-bench-")
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "fairlead")
	if out, err := exec.Command("go", "build", "-o", path, "fairlead.dev/fairlead/cmd/fairlead").CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	return path, nil
})

func TestMain(m *testing.M) {
	code := m.Run()
	if dirs, err := filepath.Glob(filepath.Join(os.TempDir(), "fairlead-bench-*")); err == nil {
		for _, dir := range dirs {
			os.RemoveAll(dir)
		}
	}
	os.Exit(code)
}

// lbNode is one LB node with a real agent, whose objects the benchmark writes.
type lbNode struct {
	net     *testnet.Network
	process *testnet.Process
}

// startNode starts the agent on objects, and waits until it has programmed
// them.
func startNode(b *testing.B, limits, objects string) *lbNode {
	b.Helper()
	need.Root(b)
	binary, err := program()
	check(b, err)
	net, err := testnet.New(testnet.Config{Nodes: []testnet.NodeSpec{{Name: "lb-1", LoadBalancer: true}, {Name: "worker-1", Backend: true}}})
	check(b, err)
	b.Cleanup(net.Close)
	node := net.Node("lb-1")
	config := fmt.Sprintf("node: lb-1\nsources: [%s]\ninterfaces: [%s]\nsecretFile: %s\nsocket: %s\nmetrics: \"\"\nlimits: {%s}\n",
		net.ObjectsDir(), testnet.Uplink, filepath.Join(net.Dir, "shard.secret"), node.Socket(), limits)
	path := filepath.Join(net.Dir, "agent.yaml")
	check(b, os.WriteFile(path, []byte(config), 0o600))
	check(b, net.WriteObjects("nodes.yaml", nodes(net)))
	check(b, net.WriteObjects("services.yaml", objects))
	process, err := node.Start(binary, "agent", "--config", path)
	check(b, err)
	b.Cleanup(func() { _ = process.Stop() })
	for range 600 {
		if d, err := node.Status(); err == nil && d.Programmed {
			return &lbNode{net, process}
		}
		if !process.Running() {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	b.Fatal(process.Log)
	return nil
}

func check(b *testing.B, err error) {
	b.Helper()
	if err != nil {
		b.Fatal(err)
	}
}

// nodes describes an LB node, and a worker with room for 65,534 Pods.
func nodes(n *testnet.Network) string {
	return fmt.Sprintf(`apiVersion: fairlead.dev/v1alpha1
kind: AddressPool
metadata: {name: default}
spec: {addresses: [10.200.0.0/16]}
---
apiVersion: fairlead.dev/v1alpha1
kind: Node
metadata: {name: lb-1}
spec: {roles: [LoadBalancer], tunnelAddresses: [%q]}
---
apiVersion: fairlead.dev/v1alpha1
kind: Node
metadata: {name: worker-1}
spec: {roles: [Backend], tunnelAddresses: [%q], podSubnets: [10.240.0.0/16]}
`, n.Node("lb-1").Address4, n.Node("worker-1").Address4)
}

func numbered(base [4]byte, n int) netip.Addr {
	v := binary.BigEndian.Uint32(base[:]) + uint32(n)
	return netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, v)))
}

// service is a Service's objects: `ports` ports on endpoints of which the
// first has a number.
func service(name string, vip netip.Addr, ports, first, backends int) string {
	var b strings.Builder
	fmt.Fprintf(&b, "---\napiVersion: v1\nkind: Service\nmetadata: {name: %s}\nspec:\n  type: LoadBalancer\n  ports:\n", name)
	for i := range ports {
		fmt.Fprintf(&b, "  - {name: p%d, port: %d}\n", i, 1000+i)
	}
	fmt.Fprintf(&b, "status: {loadBalancer: {ingress: [{ip: %q}]}}\n---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: %s-1\n  labels: {kubernetes.io/service-name: %s}\naddressType: IPv4\nports:\n", vip, name, name)
	for i := range ports {
		fmt.Fprintf(&b, "- {name: p%d, port: %d}\n", i, 8000+i)
	}
	b.WriteString("endpoints:\n")
	for i := range backends {
		fmt.Fprintf(&b, "- addresses: [%q]\n", numbered([4]byte{10, 240, 0, 1}, first+i))
	}
	return b.String()
}

// BenchmarkMemory prints what one agent and its maps take, for services of 5
// backends each, with maps as large as they need to be.
func BenchmarkMemory(b *testing.B) {
	for _, services := range []int{10, 1000, 10_000} {
		b.Run(fmt.Sprintf("services=%d", services), func(b *testing.B) {
			var objects strings.Builder
			for i := range services {
				objects.WriteString(service(fmt.Sprintf("s%d", i), numbered([4]byte{10, 200, 0, 1}, i), 1, 5*i, 5))
			}
			limits := fmt.Sprintf("services: %d, slots: %d, backends: %d", services+1, services*int(maglev.Size(5)), services*5+1)
			node := startNode(b, limits, objects.String())
			mapped, err := mapBytes(node.process.PID())
			check(b, err)
			resident, err := procField(fmt.Sprintf("/proc/%d/status", node.process.PID()), "VmRSS:")
			check(b, err)
			shared, err := procField(fmt.Sprintf("/proc/%d/status", node.process.PID()), "RssFile:")
			check(b, err)
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(float64(resident-shared)/1024, "agent-MiB") // without what is mapped of files and maps
			b.ReportMetric(float64(mapped)/(1<<20), "maps-MiB")
		})
	}
}

// mapBytes adds up what the kernel charges for a process's maps.
func mapBytes(pid int) (sum int, err error) {
	infos, err := filepath.Glob(fmt.Sprintf("/proc/%d/fdinfo/*", pid))
	if err != nil {
		return 0, err
	}
	seen := map[int]bool{}
	for _, info := range infos {
		id, err := procField(info, "map_id:")
		if err != nil || seen[id] {
			continue
		}
		seen[id] = true
		bytes, err := procField(info, "memlock:")
		if err != nil {
			return 0, err
		}
		sum += bytes
	}
	return sum, nil
}

// procField reads one number of a file of "name: number" lines.
func procField(path, name string) (int, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, name); ok {
			return strconv.Atoi(strings.Fields(rest)[0])
		}
	}
	return 0, fmt.Errorf("%s has no %s", path, name)
}

// BenchmarkChange prints the time from a renamed file to the changed slots in
// the map, when one backend leaves or returns; of it what reading the objects
// takes; and the rest, of which 10 ms are waiting for the writer's next step.
func BenchmarkChange(b *testing.B) {
	for _, c := range []struct{ backends, ports int }{{10, 1}, {1000, 1}, {5000, 1}, {10, 400}} {
		b.Run(fmt.Sprintf("backends=%d/ports=%d", c.backends, c.ports), func(b *testing.B) {
			size := int(maglev.Size(c.backends))
			vip := netip.MustParseAddr("10.200.0.1")
			states := []string{service("s", vip, c.ports, 0, c.backends), service("s", vip, c.ports, 0, c.backends-1)}
			limits := fmt.Sprintf("services: 1024, slots: %d, backends: 65536", 2*size*c.ports)
			node := startNode(b, limits, states[0])
			slots := openSlots(b, node.process.PID())
			var best, reading time.Duration
			for turn := range max(b.N, 5) {
				before := append([]byte(nil), slots...)
				started := time.Now()
				check(b, node.net.WriteObjects("services.yaml", states[(turn+1)%2]))
				waitChanged(b, node, before, slots, size, c.ports)
				if took := time.Since(started); best == 0 || took < best {
					best = took
				}
				started = time.Now()
				if _, findings := file.Load([]string{node.net.ObjectsDir()}); file.Failed(findings) {
					b.Fatal(findings)
				}
				if took := time.Since(started); reading == 0 || took < reading {
					reading = took
				}
				time.Sleep(100 * time.Millisecond) // until the agent is at rest
			}
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(best.Seconds()*1e3, "change-ms")
			b.ReportMetric(reading.Seconds()*1e3, "reading-ms")
			b.ReportMetric((best-reading).Seconds()*1e3, "rest-ms")
		})
	}
}

// openSlots maps the agent's own array of slots.
func openSlots(b *testing.B, pid int) []byte {
	b.Helper()
	infos, err := filepath.Glob(fmt.Sprintf("/proc/%d/fdinfo/*", pid))
	check(b, err)
	for _, info := range infos {
		id, err := procField(info, "map_id:")
		if err != nil {
			continue
		}
		m, err := ebpf.NewMapFromID(ebpf.MapID(id))
		check(b, err)
		b.Cleanup(func() { m.Close() })
		about, err := m.Info()
		check(b, err)
		if about.Name != "slots" {
			continue
		}
		memory, err := unix.Mmap(m.FD(), 0, int(m.MaxEntries())*8, unix.PROT_READ, unix.MAP_SHARED)
		check(b, err)
		b.Cleanup(func() { _ = unix.Munmap(memory) })
		return memory
	}
	b.Fatal("the agent has no map of slots")
	return nil
}

// waitChanged waits until each service's run of slots has changed.
func waitChanged(b *testing.B, node *lbNode, before, slots []byte, size, runs int) {
	b.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for time.Now().Before(deadline) {
		changed := 0
		for at := 0; at+size*8 <= len(slots); at += size * 8 {
			if string(slots[at:at+size*8]) != string(before[at:at+size*8]) {
				changed++
			}
		}
		if changed >= runs {
			return
		}
		time.Sleep(50 * time.Microsecond)
	}
	b.Fatalf("the slots did not change: %s", node.process.Log)
}
