// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"fairlead.dev/fairlead/internal/flowhash"
	"fairlead.dev/fairlead/internal/lb"
)

func write(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

const goodConfig = "node: lb-1\nsources: [objects]\ninterfaces: [eth0]\n"

func TestReadConfig(t *testing.T) {
	c, err := ReadConfig(write(t, "agent.yaml", goodConfig+"geneve: {vni: 7}\ntimeouts: {tcp: 3h}\n"))
	if err != nil {
		t.Fatal(err)
	}
	if c.Geneve.Port != 6082 || c.Geneve.VNI != 7 || c.Timeouts.TCP.Hours() != 3 || c.Timeouts.UDP.Minutes() != 2 || c.Socket != DefaultSocket {
		t.Errorf("config: %+v", c)
	}
}

func TestReadConfigRefuses(t *testing.T) {
	for text, want := range map[string]string{
		goodConfig + "unknown: 1\n":                    "line 4: field unknown not found",
		goodConfig + "geneve: {vni: 16777216}\n":       "geneve.vni",
		goodConfig + "log: {level: loud}\n":            "log.level",
		goodConfig + "log: {format: xml}\n":            "log.format",
		goodConfig + "timeouts: {udp: 1ms}\n":          "timeouts",
		"node: a\ninterfaces: [eth0]\n":                "sources: empty",
		"node: a\nsources: [x]\n":                      "interfaces: empty",
		goodConfig + "limits: {slots: many}\n":         "cannot unmarshal",
		"node: [\n":                                    "line",
		goodConfig + "geneve: {port: 70000}\n":         "cannot unmarshal",
		goodConfig + "timeouts: {tcp: soon}\n":         "cannot unmarshal",
		goodConfig + "genericXDP: perhaps\n":           "cannot unmarshal",
		goodConfig + "interfaces: [eth1]\n":            "already defined",
		goodConfig + "log: {level: info, colour: 1}\n": "field colour not found",
	} {
		if _, err := ReadConfig(write(t, "agent.yaml", text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v; want an error with %q", text, err, want)
		}
	}
}

func snapshot(nodes ...lb.Node) lb.Snapshot { return lb.Snapshot{Nodes: nodes} }

func TestKeys(t *testing.T) {
	dir := t.TempDir()
	single := snapshot(lb.Node{Name: "lb-1", LoadBalancer: true}, lb.Node{Name: "w", Backend: true})
	c := Config{Node: "lb-1", SecretFile: filepath.Join(dir, "new", "shard.secret")}
	made, tag, err := keys(c, single)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(c.SecretFile); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the secret's file: %v, %v", info, err)
	}
	again, _, err := keys(c, single)
	if err != nil || *again != *made || tag != made.Tag("lb-1") {
		t.Errorf("a second start has another key: %v", err)
	}
	// Of several LB nodes, none may make a key of its own.
	c.SecretFile = filepath.Join(dir, "other.secret")
	several := snapshot(lb.Node{Name: "lb-1", LoadBalancer: true}, lb.Node{Name: "lb-2", LoadBalancer: true})
	if _, _, err := keys(c, several); err == nil || !strings.Contains(err.Error(), "fairlead keys") {
		t.Errorf("several LB nodes: %v", err)
	}
	// A worker needs its tag alone.
	w := Config{Node: "w", TagFile: write(t, "w.tag", "0102030405060708\n")}
	secret, tag, err := keys(w, single)
	if err != nil || secret != nil || tag != [8]byte{1, 2, 3, 4, 5, 6, 7, 8} {
		t.Errorf("worker: %v, %v, %v", secret, tag, err)
	}
	w.TagFile = write(t, "bad.tag", "xyz")
	if _, _, err := keys(w, single); err == nil {
		t.Error("a bad tag was taken")
	}
	if _, _, err := keys(Config{Node: "who"}, single); err == nil || !strings.Contains(err.Error(), "not described") {
		t.Errorf("unknown node: %v", err)
	}
}

// Without a good configuration nothing is loaded, each finding is logged once,
// and no log or status holds a secret.
func TestFindingsAreLoggedOnce(t *testing.T) {
	secret := flowhash.Secret{0xab, 0xcd}
	bad := write(t, "objects.yaml", "apiVersion: fairlead.dev/v1alpha1\nkind: Node\nmetadata: {name: lb-1}\nspec: {roles: [Boss], tunnelAddresses: [10.0.0.1]}\n")
	var log bytes.Buffer
	config := Config{Node: "lb-1", Sources: []string{bad}, Interfaces: []string{"eth0"}, SecretFile: write(t, "s", secret.Hex())}
	a := New(config, "test", slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug})))
	for range 3 {
		a.filesChange = true
		if err := a.work(context.Background()); err == nil {
			t.Fatal("a bad configuration worked")
		}
	}
	if n := strings.Count(log.String(), "FL0104"); n != 1 {
		t.Errorf("the finding was logged %d times:\n%s", n, log.String())
	}
	d := a.Status()
	if d.Programmed || d.Problem == "" || len(d.Findings) != 1 || d.Findings[0].Line != 4 {
		t.Errorf("status: %+v", d)
	}
	if strings.Contains(log.String(), secret.Hex()[:8]) {
		t.Error("the log holds the secret")
	}
}
