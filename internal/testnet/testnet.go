// SPDX-License-Identifier: Apache-2.0

// Package testnet makes throwaway networks of namespaces: a client, a stranger,
// a router that spreads VIPs over LB nodes with the kernel's ECMP, and nodes
// with Pods, on which real agents run. Tests and the demo alone use it.
//
//	client   --+            +-- LB nodes
//	           +-- router --+
//	stranger --+            +-- workers -- Pods
package testnet

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
)

// The addresses of every network.
var (
	Client4   = netip.MustParseAddr("198.51.100.2")
	Client6   = netip.MustParseAddr("2001:db8:c::2")
	Stranger4 = netip.MustParseAddr("203.0.113.2")
	Stranger6 = netip.MustParseAddr("2001:db8:bad::2")
	// Pool4 and Pool6 are routed to the LB nodes.
	Pool4 = netip.MustParsePrefix("192.0.2.0/24")
	Pool6 = netip.MustParsePrefix("2001:db8:f::/64")
)

// GenevePort and VNI of the tunnels.
const (
	GenevePort = 6082
	VNI        = 1
)

// Config of a network.
type Config struct {
	Nodes []NodeSpec
	LAN   bool // the nodes are on one segment with the router, and have no Pods
	MTU   int  // of the links between router and nodes; 0: 1500
}

// NodeSpec is one node to make.
type NodeSpec struct {
	Name         string
	LoadBalancer bool
	Backend      bool
	Pods         int
	VLAN         uint16 // what the router sends to it is tagged with; 0: none
	MTU          int    // of its link; 0: the network's
	Agent        bool   // false: a plain server
	Extra        string // lines of its agent's configuration
}

// DefaultNodes are 3 LB nodes and 4 workers with 2 Pods each.
func DefaultNodes() []NodeSpec {
	var nodes []NodeSpec
	for i := range 3 {
		nodes = append(nodes, NodeSpec{Name: fmt.Sprintf("lb-%d", i+1), LoadBalancer: true, Agent: true})
	}
	for i := range 4 {
		nodes = append(nodes, NodeSpec{Name: fmt.Sprintf("worker-%d", i+1), Backend: true, Pods: 2, Agent: true})
	}
	return nodes
}

// Network is a running network.
type Network struct {
	Dir      string // configuration, objects, logs
	Client   *Namespace
	Stranger *Namespace
	Router   *Namespace
	Nodes    []*Node
	Watch    *Watch

	lan   bool
	all   []*Namespace
	mu    sync.Mutex
	close []func()
}

// Node is a node of a network.
type Node struct {
	*Namespace
	NodeSpec
	Address4 netip.Addr
	Address6 netip.Addr
	Pods     []*Pod
	Link     string // the router's device toward it

	net   *Network
	agent *Process
}

// Pod is a namespace behind a veth of a node, as a CNI makes it.
type Pod struct {
	*Namespace
	Node     *Node
	Address4 netip.Addr
	Address6 netip.Addr
}

// Uplink is the device of every node toward the router.
const Uplink = "eth0"

const dirPrefix = "fairlead-net-"

// New makes a network. The caller must Close it; what a killed process left
// is removed by the next New.
func New(cfg Config) (_ *Network, err error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("make network: only root may make namespaces")
	}
	removeLeftovers()
	if cfg.MTU == 0 {
		cfg.MTU = 1500
	}
	n := &Network{}
	defer func() {
		if err != nil {
			n.Close()
		}
	}()
	if n.Dir, err = os.MkdirTemp("", fmt.Sprintf("%s%d-", dirPrefix, os.Getpid())); err != nil {
		return nil, fmt.Errorf("make directory: %w", err)
	}
	if err := n.build(cfg); err != nil {
		return nil, err
	}
	if n.Watch, err = newWatch(n); err != nil {
		return nil, err
	}
	return n, n.writeKeys()
}

// removeLeftovers removes directories of processes that are no more. Of
// namespaces nothing is left: they ended with the process.
func removeLeftovers() {
	dirs, _ := filepath.Glob(filepath.Join(os.TempDir(), dirPrefix+"*"))
	for _, dir := range dirs {
		pid, _, _ := strings.Cut(strings.TrimPrefix(filepath.Base(dir), dirPrefix), "-")
		if n, err := strconv.Atoi(pid); err == nil && errors.Is(syscall.Kill(n, 0), syscall.ESRCH) {
			_ = os.RemoveAll(dir)
		}
	}
}

// OnClose runs f when the network is closed, last first.
func (n *Network) OnClose(f func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.close = append(n.close, f)
}

// Close stops all processes and servers and removes the network.
func (n *Network) Close() {
	n.mu.Lock()
	stops := n.close
	n.close = nil
	n.mu.Unlock()
	var processes sync.WaitGroup
	for _, node := range n.Nodes {
		if node.agent != nil {
			processes.Go(func() { _ = node.agent.Stop() })
		}
	}
	processes.Wait()
	for i := len(stops) - 1; i >= 0; i-- {
		stops[i]()
	}
	if n.Watch != nil {
		n.Watch.close()
	}
	for _, ns := range n.all {
		ns.close()
	}
	n.all, n.Watch, n.Nodes = nil, nil, nil
	if n.Dir != "" {
		_ = os.RemoveAll(n.Dir)
	}
}

// Node returns a node by name.
func (n *Network) Node(name string) *Node {
	for _, node := range n.Nodes {
		if node.Name() == name {
			return node
		}
	}
	panic("no node " + name)
}

// Name returns the node's name.
func (n *Node) Name() string { return n.NodeSpec.Name }

// AllPods returns the Pods of all nodes.
func (n *Network) AllPods() []*Pod {
	var pods []*Pod
	for _, node := range n.Nodes {
		pods = append(pods, node.Pods...)
	}
	return pods
}

// LoadBalancers returns the nodes with that role.
func (n *Network) LoadBalancers() []*Node {
	var nodes []*Node
	for _, node := range n.Nodes {
		if node.LoadBalancer {
			nodes = append(nodes, node)
		}
	}
	return nodes
}

// Backends returns the nodes with that role.
func (n *Network) Backends() []*Node {
	var nodes []*Node
	for _, node := range n.Nodes {
		if node.Backend {
			nodes = append(nodes, node)
		}
	}
	return nodes
}
