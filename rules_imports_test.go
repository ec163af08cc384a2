// SPDX-License-Identifier: Apache-2.0

package fairlead

import (
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"
)

const module = "fairlead.dev/fairlead"

var (
	kubernetes = []string{"k8s.io/", "sigs.k8s.io/yaml", "api"}
	netlink    = []string{"github.com/vishvananda/netlink", "github.com/vishvananda/netns", "golang.org/x/sys/"}
)

// mayImport says for each package what it may import besides the standard
// library: our own by their path in the repository, others by prefix. Who is
// not here may not be imported by anybody.
var mayImport = map[string][]string{
	// Pure: no I/O, goroutines or clock.
	"internal/lb":       {},
	"internal/maglev":   {},
	"internal/flowhash": {},
	"internal/slots":    {"internal/lb", "internal/maglev"},
	"internal/model":    {"internal/lb", "internal/slots", "internal/flowhash"},
	"internal/plan":     {"internal/lb", "internal/maglev"},
	"api":               {"k8s.io/", "sigs.k8s.io/yaml"},

	// Edges: never each other.
	"internal/file":      slices.Concat(kubernetes, []string{"internal/lb", "go.yaml.in/yaml/v3", "github.com/fsnotify/fsnotify"}),
	"internal/route":     slices.Concat(netlink, []string{"internal/lb"}),
	"internal/dataplane": slices.Concat(netlink, []string{"internal/lb", "internal/maglev", "internal/slots", "internal/flowhash", "github.com/cilium/ebpf"}),
	"internal/peer":      {"internal/lb"},
	"internal/health":    {"internal/lb", "internal/run", "golang.org/x/sys/"},
	"internal/status":    {"internal/lb", "github.com/prometheus/client_golang"},

	// Assembly.
	"internal/run": {},
	"internal/agent": {
		"internal/lb", "internal/plan", "internal/file", "internal/route", "internal/dataplane", "internal/status", "internal/run",
		"internal/peer", "internal/slots", "internal/health",
		"internal/flowhash", "go.yaml.in/yaml/v3", "github.com/prometheus/client_golang", "github.com/vishvananda/netlink",
	},

	// For tests and the demo.
	"internal/need":    {},
	"internal/testnet": slices.Concat(netlink, []string{"internal/lb", "internal/peer", "internal/flowhash", "internal/status", "github.com/cilium/ebpf"}),
	"internal/demo":    {"internal/testnet", "internal/lb", "internal/status", "golang.org/x/term", "golang.org/x/sys/"},
}

// forTests may be imported by tests, the demo and what is below test/ alone.
var forTests = []string{"internal/testnet", "internal/need"}

func checkImports(t tree) []string {
	var violations []string
	for _, name := range t.ours(false) {
		pkg := packageOf(name)
		file, _ := t.parse(name)
		for _, spec := range file.Imports {
			imported, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				continue
			}
			if reason := refuse(pkg, name, imported); reason != "" {
				violations = append(violations, fmt.Sprintf("%s imports %s: %s", name, imported, reason))
			}
		}
		if _, ok := mayImport[pkg]; !ok && strings.HasPrefix(name, "internal/") {
			violations = append(violations, fmt.Sprintf("%s: %s is not in the table of what a package may import", name, pkg))
		}
	}
	return violations
}

// refuse says why a package may not import another; empty: it may.
func refuse(pkg, file, imported string) string {
	ours, isOurs := strings.CutPrefix(imported, module+"/")
	if isOurs {
		imported = ours
	} else if first, _, _ := strings.Cut(imported, "/"); !strings.Contains(first, ".") {
		return "" // the standard library
	}
	if strings.HasPrefix(pkg, "test/") {
		return ""
	}
	if slices.Contains(forTests, imported) && pkg != "internal/demo" && file != "cmd/fairlead/demo.go" {
		return "it is for tests and the demo"
	}
	if strings.HasPrefix(pkg, "cmd/") {
		return ""
	}
	for _, allowed := range mayImport[pkg] {
		if imported == allowed || strings.HasPrefix(imported, strings.TrimSuffix(allowed, "/")+"/") {
			return ""
		}
	}
	return "it is not in the table of what a package may import"
}

// packageOf returns the package of a file as the table names it: all of api is
// one.
func packageOf(name string) string {
	dir := path.Dir(name)
	if strings.HasPrefix(dir, "api/") {
		return "api"
	}
	return dir
}
