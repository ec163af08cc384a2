// SPDX-License-Identifier: Apache-2.0

package testnet

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"fairlead.dev/fairlead/internal/flowhash"
	"fairlead.dev/fairlead/internal/peer"
	"fairlead.dev/fairlead/internal/status"
)

// secret of every network: it protects nothing.
var secret = flowhash.Secret{'t', 'e', 's', 't', 'n', 'e', 't'}

// writeKeys writes the secret for LB nodes and a tag for each other node.
func (n *Network) writeKeys() error {
	if err := os.MkdirAll(n.ObjectsDir(), 0o755); err != nil {
		return fmt.Errorf("make directory of objects: %w", err)
	}
	if err := os.WriteFile(filepath.Join(n.Dir, "shard.secret"), []byte(secret.Hex()), 0o600); err != nil {
		return fmt.Errorf("write the secret: %w", err)
	}
	authority, certificate, _, err := peer.NewAuthority(time.Now())
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(n.Dir, "ca.crt"), certificate, 0o600); err != nil {
		return fmt.Errorf("write the authority's certificate: %w", err)
	}
	for _, node := range n.Nodes {
		certificate, key, err := authority.Issue(node.Name(), time.Now())
		if err != nil {
			return err
		}
		if err := errors.Join(os.WriteFile(filepath.Join(n.Dir, node.Name()+".crt"), certificate, 0o600),
			os.WriteFile(filepath.Join(n.Dir, node.Name()+".key"), key, 0o600)); err != nil {
			return fmt.Errorf("write a certificate: %w", err)
		}
		tag := secret.Tag(node.Name())
		if err := os.WriteFile(filepath.Join(n.Dir, node.Name()+".tag"), []byte(hex.EncodeToString(tag[:])), 0o600); err != nil {
			return fmt.Errorf("write a tag: %w", err)
		}
	}
	return nil
}

// ObjectsDir is where the agents read objects from.
func (n *Network) ObjectsDir() string { return filepath.Join(n.Dir, "objects") }

// Service is a Service to balance over Pods.
type Service struct {
	Name       string
	VIPs       []netip.Addr
	Port       uint16
	TargetPort uint16
	Protocol   string // TCP or UDP
	Mode       string // of its ServicePolicy; "" for none
	Datagrams  string // the same
	Policy     string // more of its ServicePolicy's spec, in YAML's flow style
	Spec       string // more of its own spec, the same
	Pods       []*Pod
	Draining   []*Pod  // terminating, and still serving
	Servers    []*Node // servers that hold the VIP, for mode IPIP
	Leaving    []*Node // the same, terminating
}

// WriteNodes describes the nodes and the pools.
func (n *Network) WriteNodes() error {
	var b strings.Builder
	fmt.Fprintf(&b, "apiVersion: fairlead.dev/v1alpha1\nkind: AddressPool\nmetadata: {name: default}\nspec: {addresses: [%q, %q]}\n", Pool4, Pool6)
	for _, node := range n.Nodes {
		var roles []string
		if node.LoadBalancer {
			roles = append(roles, "LoadBalancer")
		}
		if node.Backend {
			roles = append(roles, "Backend")
		}
		fmt.Fprintf(&b, "---\napiVersion: fairlead.dev/v1alpha1\nkind: Node\nmetadata: {name: %s}\nspec:\n  roles: [%s]\n  tunnelAddresses: [%q, %q]\n",
			node.Name(), strings.Join(roles, ", "), node.Address4, node.Address6)
		if len(node.Pods) > 0 {
			fmt.Fprintf(&b, "  podSubnets: [%q, %q]\n", node.PodSubnet4(), node.PodSubnet6())
		}
	}
	return n.WriteObjects("nodes.yaml", b.String())
}

// WriteService describes a Service, its endpoints and its policy, or changes
// them.
func (n *Network) WriteService(s Service) error {
	var b strings.Builder
	var ips []string
	for _, vip := range s.VIPs {
		ips = append(ips, fmt.Sprintf("{ip: %q}", vip))
	}
	fmt.Fprintf(&b, "apiVersion: v1\nkind: Service\nmetadata: {name: %s}\nspec:\n  type: LoadBalancer\n  ports: [{port: %d, protocol: %s}]\n%sstatus: {loadBalancer: {ingress: [%s]}}\n",
		s.Name, s.Port, s.Protocol, indented(s.Spec), strings.Join(ips, ", "))
	if s.Mode+s.Datagrams+s.Policy != "" {
		policy := fmt.Sprintf("targetRefs: [{name: %s}], mode: %q, datagrams: %q", s.Name, s.Mode, s.Datagrams)
		if s.Policy != "" {
			policy += ", " + s.Policy
		}
		fmt.Fprintf(&b, "---\napiVersion: fairlead.dev/v1alpha1\nkind: ServicePolicy\nmetadata: {name: %s}\nspec: {%s}\n", s.Name, policy)
	}
	for _, family := range []string{"IPv4", "IPv6"} {
		fmt.Fprintf(&b, "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: %s-%s\n  labels: {kubernetes.io/service-name: %s}\naddressType: %s\nports: [{port: %d, protocol: %s}]\nendpoints:\n",
			s.Name, strings.ToLower(family), s.Name, family, s.TargetPort, s.Protocol)
		for _, address := range s.addresses(family == "IPv4") {
			fmt.Fprintf(&b, "- addresses: [%q]\n", address)
		}
		leaving := Service{Pods: s.Draining, Servers: s.Leaving}
		for _, address := range leaving.addresses(family == "IPv4") {
			fmt.Fprintf(&b, "- addresses: [%q]\n  conditions: {ready: false, serving: true, terminating: true}\n", address)
		}
		if len(s.Pods)+len(s.Draining)+len(s.Servers)+len(s.Leaving) == 0 {
			b.WriteString("[]\n")
		}
	}
	return n.WriteObjects(s.Name+".yaml", strings.ReplaceAll(b.String(), "endpoints:\n[]", "endpoints: []"))
}

// indented is a line of a Service's spec.
func indented(line string) string {
	if line == "" {
		return ""
	}
	return "  " + line + "\n"
}

func (s *Service) addresses(v4 bool) (all []netip.Addr) {
	pick := func(a4, a6 netip.Addr) {
		if v4 {
			all = append(all, a4)
		} else {
			all = append(all, a6)
		}
	}
	for _, pod := range s.Pods {
		pick(pod.Address4, pod.Address6)
	}
	for _, server := range s.Servers {
		pick(server.Address4, server.Address6)
	}
	return all
}

// WriteObjects replaces a file of objects in one step.
func (n *Network) WriteObjects(name, text string) error {
	path := filepath.Join(n.ObjectsDir(), name)
	if err := os.WriteFile(path+".tmp", []byte(text), 0o644); err != nil {
		return fmt.Errorf("write objects: %w", err)
	}
	if err := os.Rename(path+".tmp", path); err != nil {
		return fmt.Errorf("write objects: %w", err)
	}
	return nil
}

// StartAgents starts `binary agent` on every node that has one.
func (n *Network) StartAgents(binary string) error {
	for _, node := range n.Nodes {
		if node.Agent {
			if err := node.StartAgent(binary); err != nil {
				return err
			}
		}
	}
	return nil
}

// StartAgent starts, or starts again, the agent of one node.
func (n *Node) StartAgent(binary string) error {
	key := "tagFile: " + filepath.Join(n.net.Dir, n.Name()+".tag")
	if n.LoadBalancer {
		key = "secretFile: " + filepath.Join(n.net.Dir, "shard.secret")
	}
	config := fmt.Sprintf("node: %s\nsources: [%s]\ninterfaces: [%s]\n%s\ngeneve: {port: %d, vni: %d}\nsocket: %s\nmetrics: \"\"\nlimits: {slots: 262144, candidates: 65536, services: 1024, backends: 1024, flows: 65536}\nlog: {level: debug}\n",
		n.Name(), n.net.ObjectsDir(), Uplink, key, GenevePort, VNI, n.Socket())
	file := filepath.Join(n.net.Dir, n.Name())
	config += fmt.Sprintf("peers: {certificate: %s.crt, key: %s.key, authority: %s}\n", file, file, filepath.Join(n.net.Dir, "ca.crt"))
	if strings.Contains(n.Extra, "limits:") {
		config = config[:strings.Index(config, "limits:")] + config[strings.Index(config, "log:"):]
	}
	config += n.Extra
	path := filepath.Join(n.net.Dir, n.Name()+".config")
	if err := os.WriteFile(path, []byte(config), 0o600); err != nil {
		return fmt.Errorf("write configuration of %s: %w", n.Name(), err)
	}
	p, err := n.Start(binary, "agent", "--config", path)
	if err != nil {
		return err
	}
	n.agent = p
	return nil
}

// AgentProcess is the node's agent, nil before StartAgent.
func (n *Node) AgentProcess() *Process { return n.agent }

// Socket is the agent's status socket.
func (n *Node) Socket() string { return filepath.Join(n.net.Dir, n.Name()+".sock") }

// api talks to the agent's socket.
func (n *Node) api() *http.Client {
	return &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", n.Socket())
		}}}
}

// Status asks the node's agent.
func (n *Node) Status() (status.Document, error) {
	var d status.Document
	response, err := n.api().Get("http://agent/v1/status")
	if err != nil {
		return d, fmt.Errorf("ask the agent of %s: %w", n.Name(), err)
	}
	defer response.Body.Close()
	return d, json.NewDecoder(response.Body).Decode(&d)
}

// WaitProgrammed waits until every agent holds its plan, knows its next hops,
// and the LB nodes have so many backends in each of their services.
func (n *Network) WaitProgrammed(backends int, timeout time.Duration) error {
	deadline := time.Now().Add(timeout)
	for _, node := range n.Nodes {
		if !node.Agent {
			continue
		}
		for {
			why := node.unready(backends)
			if why == "" {
				break
			}
			if !node.agent.Running() {
				return fmt.Errorf("the agent of %s ended: %s", node.Name(), node.agent.Log)
			}
			if time.Now().After(deadline) {
				return errors.New(node.Name() + ": " + why + "\n" + node.agent.Log.String())
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
	return nil
}

func (n *Node) unready(backends int) string {
	d, err := n.Status()
	switch {
	case err != nil:
		return err.Error()
	case !d.Programmed:
		return "not programmed: " + d.Problem
	case len(d.Unresolved) > 0:
		return "unresolved: " + strings.Join(d.Unresolved, "; ")
	case n.LoadBalancer && len(d.Services) == 0 && backends > 0:
		return "no services yet"
	}
	for _, s := range d.Services {
		if len(s.Backends) != backends {
			return fmt.Sprintf("%s has %d backends, not %d", s.VIP, len(s.Backends), backends)
		}
	}
	return ""
}

// Hashed returns the backend that the hash names for a TCP connection, whoever
// owns it: where the agent's program would send its SYN.
func (n *Node) Hashed(client, vip netip.AddrPort) (netip.Addr, error) {
	body, err := json.Marshal(map[string]any{"frame": synFrame(client, vip)})
	if err != nil {
		return netip.Addr{}, err
	}
	response, err := n.api().Post("http://agent/v1/trace", "application/json", bytes.NewReader(body))
	if err != nil {
		return netip.Addr{}, fmt.Errorf("ask the agent of %s: %w", n.Name(), err)
	}
	defer response.Body.Close()
	var trace struct{ Target netip.AddrPort }
	if err := json.NewDecoder(response.Body).Decode(&trace); err != nil {
		return netip.Addr{}, fmt.Errorf("read the trace of %s: %w", n.Name(), err)
	}
	return trace.Target.Addr(), nil
}

// synFrame is a frame of a SYN; nothing looks at its checksums.
func synFrame(client, vip netip.AddrPort) []byte {
	tcp := make([]byte, 20)
	binary.BigEndian.PutUint16(tcp, client.Port())
	binary.BigEndian.PutUint16(tcp[2:], vip.Port())
	tcp[12], tcp[13] = 5<<4, 2
	frame := make([]byte, 14)
	if vip.Addr().Is4() {
		ip := make([]byte, 20)
		ip[0], ip[3], ip[8], ip[9] = 0x45, 40, 64, 6
		copy(ip[12:], client.Addr().AsSlice())
		copy(ip[16:], vip.Addr().AsSlice())
		binary.BigEndian.PutUint16(frame[12:], 0x0800)
		return append(append(frame, ip...), tcp...)
	}
	ip := make([]byte, 40)
	ip[0], ip[5], ip[6], ip[7] = 0x60, 20, 6, 64
	copy(ip[8:], client.Addr().AsSlice())
	copy(ip[24:], vip.Addr().AsSlice())
	binary.BigEndian.PutUint16(frame[12:], 0x86dd)
	return append(append(frame, ip...), tcp...)
}
