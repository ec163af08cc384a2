// SPDX-License-Identifier: Apache-2.0

package file

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"fairlead.dev/fairlead/internal/lb"
)

// A whole, good configuration; each case below changes one thing.
const good = `apiVersion: fairlead.dev/v1alpha1
kind: AddressPool
metadata: {name: pool}
spec: {addresses: [192.0.2.0/24, "2001:db8::1-2001:db8::ff"]}
---
apiVersion: fairlead.dev/v1alpha1
kind: Node
metadata: {name: lb-1}
spec: {roles: [LoadBalancer], tunnelAddresses: [10.0.0.1, "fd00::1"]}
---
apiVersion: fairlead.dev/v1alpha1
kind: Node
metadata: {name: worker-1}
spec: {roles: [Backend], tunnelAddresses: [10.0.0.11], podSubnets: [10.244.1.0/24]}
---
apiVersion: v1
kind: Service
metadata: {name: web, uid: abc, managedFields: []}
spec:
  type: LoadBalancer
  clusterIP: 10.96.0.7
  ports:
  - {name: http, port: 80, targetPort: web, nodePort: 30080}
  - {name: dns, port: 53, protocol: UDP}
status: {loadBalancer: {ingress: [{ip: 192.0.2.1, ipMode: VIP}]}}
---
apiVersion: v1
kind: List
items:
- apiVersion: discovery.k8s.io/v1
  kind: EndpointSlice
  metadata: {name: web-1, labels: {kubernetes.io/service-name: web}}
  addressType: IPv4
  ports: [{name: http, port: 8080}, {name: dns, port: 5353, protocol: UDP}]
  endpoints:
  - {addresses: [10.244.1.2], nodeName: worker-1, targetRef: {kind: Pod, uid: u1}, conditions: {ready: true}}
  - {addresses: [10.244.1.3], conditions: {ready: false, serving: true, terminating: true}}
---
apiVersion: fairlead.dev/v1alpha1
kind: ServicePolicy
metadata: {name: web}
spec: {targetRefs: [{name: web}], datagrams: Independent, tableSize: 1024}
`

func load(t *testing.T, text string) (lb.Snapshot, []lb.Finding) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "objects.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return Load([]string{path})
}

func TestLoad(t *testing.T) {
	s, findings := load(t, good)
	if len(findings) > 0 {
		t.Fatalf("findings: %v", findings)
	}
	if len(s.Services) != 1 || len(s.Nodes) != 2 || len(s.Pools) != 1 {
		t.Fatalf("snapshot: %+v", s)
	}
	web := s.Services[0]
	if web.ID.String() != "default/web" || len(web.VIPs) != 1 || len(web.Ports) != 2 || !web.Policy.Independent || web.Policy.TableSize != 1024 {
		t.Errorf("service: %+v", web)
	}
	ready, leaving := web.Endpoints[0], web.Endpoints[1]
	if !ready.Ready || !ready.Serving || ready.UID != "u1" || ready.Ports[lb.PortKey{Name: "http", Protocol: lb.TCP}] != 8080 {
		t.Errorf("endpoint: %+v", ready)
	}
	if leaving.Ready || !leaving.Serving || !leaving.Terminating {
		t.Errorf("endpoint: %+v", leaving)
	}
}

// sameLine: the finding names the line that was changed.
const sameLine = -1

func TestFindings(t *testing.T) {
	for _, c := range []struct {
		from, to string
		code     string
		line     int
		field    string
	}{
		{"targetPort: web", "targtPort: web", "FL0006", sameLine, "spec.ports[0].targtPort"},
		{"port: 80,", "port: 80000,", "FL0103", sameLine, "spec.ports[0].port"},
		{"port: 80,", "port: eighty,", "FL0007", 22, "spec.ports.port"},
		{"ip: 192.0.2.1,", "ip: 192.0.2.300,", "FL0101", sameLine, "status.loadBalancer.ingress[0].ip"},
		{"ip: 192.0.2.1,", "ip: 198.51.100.1,", "FL0205", sameLine, "status.loadBalancer.ingress"},
		{"protocol: UDP}\nstatus", "protocol: SCTP}\nstatus", "FL0201", sameLine, "spec.ports[1].protocol"},
		{"addressType: IPv4", "addressType: IPv6", "FL0301", 36, "endpoints[0].addresses[0]"},
		{"addresses: [10.244.1.2]", "addresses: [127.0.0.1]", "FL0303", sameLine, "endpoints[0].addresses[0]"},
		{"addresses: [10.244.1.2]", "addresses: [192.0.2.1]", "FL0303", 16, "endpoints"},
		{"roles: [LoadBalancer]", "roles: [Boss]", "FL0104", sameLine, "spec.roles[0]"},
		{"tunnelAddresses: [10.0.0.11]", "tunnelAddresses: [10.0.0.1]", "FL0107", sameLine, "spec.tunnelAddresses"},
		{"tunnelAddresses: [10.0.0.11]", "tunnelAddresses: []", "FL0105", sameLine, "spec.tunnelAddresses"},
		{"podSubnets: [10.244.1.0/24]", "podSubnets: [10.244.1.1/24]", "FL0102", sameLine, "spec.podSubnets[0]"},
		{"tableSize: 1024", "tableSize: 1000", "FL0106", sameLine, "spec.tableSize"},
		{"tableSize: 1024", "slotsPerBackend: 9", "FL0106", sameLine, "spec.slotsPerBackend"},
		{"tableSize: 1024", "tableSize: 1024, slotsPerBackend: 50", "FL0106", sameLine, "spec.slotsPerBackend"},
		{"tableSize: 1024", "drain: {timeout: -1s}", "FL0106", sameLine, "spec.drain.timeout"},
		{"datagrams: Independent", "mode: Tunnel", "FL0106", sameLine, "spec.mode"},
		{"tableSize: 1024", "healthCheck: {kind: SMTP}", "FL0106", sameLine, "spec.healthCheck.kind"},
		{"tableSize: 1024", "healthCheck: {kind: TCP, path: /x}", "FL0106", sameLine, "spec.healthCheck.path"},
		{"tableSize: 1024", "healthCheck: {kind: HTTP, path: x}", "FL0106", sameLine, "spec.healthCheck.path"},
		{"tableSize: 1024", "healthCheck: {kind: HTTP, codes: [\"99\"]}", "FL0106", sameLine, "spec.healthCheck.codes[0]"},
		{"tableSize: 1024", "healthCheck: {kind: HTTP, host: a b}", "FL0106", sameLine, "spec.healthCheck.host"},
		{"tableSize: 1024", "healthCheck: {kind: TCP, interval: 1ms}", "FL0106", sameLine, "spec.healthCheck.interval"},
		{"tableSize: 1024", "healthCheck: {kind: TCP, timeout: 9s}", "FL0106", sameLine, "spec.healthCheck.timeout"},
		{"tableSize: 1024", "healthCheck: {kind: TCP, fall: 101}", "FL0106", sameLine, "spec.healthCheck.fall"},
		{"tableSize: 1024", "healthCheck: {kind: TCP, port: 70000}", "FL0103", sameLine, "spec.healthCheck.port"},
		{"tableSize: 1024", "healthCheck: {kind: TCP, probers: 65}", "FL0106", sameLine, "spec.healthCheck.probers"},
		{"tableSize: 1024", "healthCheck: {kind: TCP, onFailure: Weep}", "FL0106", sameLine, "spec.healthCheck.onFailure"},
		{"tableSize: 1024", "limits: {bitsPerSecond: 8}", "FL0106", sameLine, "spec.limits.bitsPerSecond"},
		{"tableSize: 1024", "limits: {perClient: {packetsPerSecond: -1}}", "FL0106", sameLine, "spec.limits.perClient.packetsPerSecond"},
		{"tableSize: 1024", "synCookies: {threshold: -1}", "FL0106", sameLine, "spec.synCookies.threshold"},
		{"tableSize: 1024", "mode: NAT, synCookies: {threshold: 9}", "FL0106", sameLine, "spec.synCookies.threshold"},
		{"tableSize: 1024", "weights: [{weight: 3}]", "FL0106", sameLine, "spec.weights[0]"},
		{"tableSize: 1024", "weights: [{address: 10.244.1.2, weight: 1001}]", "FL0106", sameLine, "spec.weights[0].weight"},
		{"tableSize: 1024", "weights: [{address: nobody, weight: 1}]", "FL0101", sameLine, "spec.weights[0].address"},
		{"  type: LoadBalancer", "  type: LoadBalancer\n  sessionAffinity: Cookie", "FL0207", 21, "spec.sessionAffinity"},
		{"  type: LoadBalancer", "  type: LoadBalancer\n  loadBalancerSourceRanges: [10.0.0.0/33]", "FL0102", 21, "spec.loadBalancerSourceRanges[0]"},
		{"  type: LoadBalancer", "  type: LoadBalancer\n  loadBalancerSourceRanges: [\"2001:db8::/32\"]", "FL0208", 21, "spec.loadBalancerSourceRanges"},
		{"targetRefs: [{name: web}]", "targetRefs: [{name: wob}]", "FL0302", sameLine, "spec.targetRefs[0].name"},
		{"kind: ServicePolicy", "kind: ServicePlicy", "FL0005", 39, "kind"},
		{"metadata: {name: pool}", "metadata: {}", "FL0009", 1, "metadata.name"},
		{"metadata: {name: worker-1}", "metadata: {name: lb-1}", "FL0008", 11, "metadata.name"},
		{"uid: abc", "name: web", "FL0010", sameLine, "metadata.name"},
		{"clusterIP: 10.96.0.7", "clusterIP: &a 10.96.0.7", "FL0004", sameLine, "spec.clusterIP"},
		{"  type: LoadBalancer", "\ttype: LoadBalancer", "FL0002", 0, ""},
		{"name: dns, port: 5353", "name: dnss, port: 5353", "FL0305", 24, "spec.ports[1].name"},
		{"2001:db8::1-2001:db8::ff", "2001:db8::ff-2001:db8::1", "FL0102", sameLine, "spec.addresses[1]"},
	} {
		t.Run(c.code+" "+c.to, func(t *testing.T) {
			text := strings.Replace(good, c.from, c.to, 1)
			if text == good {
				t.Fatalf("%q is not in the configuration", c.from)
			}
			line := c.line
			if line == sameLine {
				line = 1 + strings.Count(text[:strings.Index(text, c.to)], "\n")
			}
			_, findings := load(t, text)
			for _, f := range findings {
				if f.Code == c.code && f.Line == line && f.Field == c.field && f.Remedy != "" && f.Problem != "" {
					return
				}
			}
			t.Errorf("want %s at line %d, field %q; got %v", c.code, line, c.field, findings)
		})
	}
}

func TestDuplicatePort(t *testing.T) {
	other := "---\napiVersion: v1\nkind: Service\nmetadata: {name: other}\nspec: {type: LoadBalancer, ports: [{port: 80}]}\nstatus: {loadBalancer: {ingress: [{ip: 192.0.2.1}]}}\n"
	_, findings := load(t, good+other)
	if len(findings) != 1 || findings[0].Code != "FL0203" || !strings.Contains(findings[0].Problem, "default/other") {
		t.Errorf("findings: %v", findings)
	}
}

func TestAnnotationGivesVIPs(t *testing.T) {
	text := strings.Replace(good, "uid: abc", "annotations: {fairlead.dev/addresses: \"192.0.2.9, 2001:db8::5\"}", 1)
	text = strings.Replace(text, "status: {loadBalancer: {ingress: [{ip: 192.0.2.1, ipMode: VIP}]}}\n", "", 1)
	s, findings := load(t, text)
	if len(findings) > 0 || len(s.Services[0].VIPs) != 2 {
		t.Errorf("VIPs %v, findings %v", s.Services[0].VIPs, findings)
	}
}

func TestRanges(t *testing.T) {
	for text, want := range map[string]string{
		"192.0.2.0/24":            "[192.0.2.0/24]",
		"192.0.2.7":               "[192.0.2.7/32]",
		"192.0.2.1-192.0.2.6":     "[192.0.2.1/32 192.0.2.2/31 192.0.2.4/31 192.0.2.6/32]",
		"0.0.0.0-255.255.255.255": "[0.0.0.0/0]",
		"2001:db8::1-2001:db8::2": "[2001:db8::1/128 2001:db8::2/128]",
	} {
		if got, err := parseRange(text); err != nil || fmt.Sprint(got) != want {
			t.Errorf("%s: %v, %v; want %s", text, got, err, want)
		}
	}
	// Every address of a range is in exactly one prefix, and no other is.
	from, to := netip.MustParseAddr("10.0.0.3"), netip.MustParseAddr("10.0.1.77")
	n := 0
	for _, p := range prefixesOf(from, to) {
		for a := p.Addr(); p.Contains(a); a = a.Next() {
			if a.Less(from) || to.Less(a) {
				t.Fatalf("%s is outside", a)
			}
			n++
		}
	}
	if n != 256-3+78 {
		t.Errorf("%d addresses", n)
	}
}

// A file that is replaced by renaming, as editors and ConfigMaps do, is noticed.
func TestWatch(t *testing.T) {
	dir := t.TempDir()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	calls := make(chan struct{}, 100)
	done := make(chan error, 1)
	go func() { done <- Watch(ctx, []string{dir}, func() { calls <- struct{}{} }) }()
	for i := range 3 {
		deadline := time.After(4 * time.Second)
		tick := time.NewTicker(50 * time.Millisecond) // the watch may not have begun yet
		for noticed := false; !noticed; {
			path := filepath.Join(dir, "objects.yaml")
			if err := os.WriteFile(path+".tmp", fmt.Appendf(nil, "# %d", i), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Rename(path+".tmp", path); err != nil {
				t.Fatal(err)
			}
			select {
			case <-calls:
				noticed = true
			case <-tick.C:
			case <-deadline:
				t.Fatal("a change was not noticed")
			}
		}
		tick.Stop()
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func FuzzLoad(f *testing.F) {
	f.Add(good)
	f.Add("a: &a [*a]")
	f.Add("kind: List\nitems: {}")
	f.Fuzz(func(t *testing.T, text string) {
		l := &loader{seen: map[string]*object{}}
		l.parse("fuzz", []byte(text))
		l.snapshot()
		for _, finding := range l.findings {
			if finding.Code == "" || finding.Remedy == "" {
				t.Errorf("finding without code or remedy: %+v", finding)
			}
		}
	})
}
