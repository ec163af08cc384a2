// SPDX-License-Identifier: Apache-2.0

package status

import (
	"encoding/json"
	"flag"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"fairlead.dev/fairlead/internal/lb"
)

var update = flag.Bool("update", false, "rewrite golden files")

// document has something in every field.
func document() Document {
	begin, flows := time.Unix(1_000_000, 0).UTC(), uint32(7)
	return Document{
		Node: "lb-1", Version: "v1", Roles: []string{"LoadBalancer", "Backend"}, Since: begin, Now: begin.Add(90 * time.Second),
		Programmed: true, ProgrammedAt: begin.Add(80 * time.Second), ChangedAt: begin.Add(30 * time.Second),
		Attachments: []Attachment{{"eth0", "native"}},
		Services: []Service{{Namespace: "default", Name: "web", VIP: "2001:db8::1", Port: 80, Protocol: "TCP", Slots: 256, Contested: 12, ChangedAt: begin.Add(60 * time.Second), Moved: 0.25,
			Imbalance: 1.5, Problem: "every backend fails its health check", Keeps: "flows outlive changes", Counter: Counter{Packets: 1000, Bytes: 64000, Connections: 10}, Backends: []Backend{
				{Address: "10.1.0.5:8080", Node: "worker-1", Mode: "Geneve", Tunnel: "10.0.0.11", Wanted: "active", State: "active", Slots: 256, Share: 1,
					WantedPart: 1, NextHop: "resolved", Counter: Counter{Packets: 900, Bytes: 60000, Connections: 10}},
				{Address: "10.1.0.6:8080", Node: "worker-1", Mode: "Geneve", Tunnel: "10.0.0.11", Wanted: "draining", State: "draining",
					LeavingSince: begin.Add(60 * time.Second), Flows: &flows, Check: "status 503, want 200-399", CheckedAt: begin.Add(89 * time.Second), CheckTime: 0.002, NextHop: "kernel", Counter: Counter{Packets: 100, Bytes: 4000}},
			}}},
		Pods:       []Pod{{"10.2.0.5:8080", "TCP", []string{"192.0.2.1:80", "192.0.2.2:80"}}},
		Drops:      []Count{{"no_service", 3}, {"unowned", 2}},
		Events:     []Count{{"bounce", 4}},
		Capacity:   []Capacity{{"slots", 256, 4096}, {"hints", -1, 1024}},
		Findings:   []lb.Finding{{Code: "FL0402", Severity: lb.Warning, Object: "Service default/web", Field: "endpoints", Problem: "is on no node", Remedy: "describe it"}},
		Unresolved: []string{"the route to 10.0.0.12 leads nowhere"},
	}
}

func golden(t *testing.T, path, got string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil || got != string(want) {
		t.Errorf("%s (%v):\n%s\nwant\n%s", path, err, got, want)
	}
}

func TestTables(t *testing.T) {
	for name, wide := range map[string]bool{"table": false, "wide": true} {
		var text strings.Builder
		if err := WriteTable(&text, document(), wide); err != nil {
			t.Fatal(err)
		}
		golden(t, "testdata/"+name+".txt", text.String())
	}
	d := document()
	d.Programmed, d.Problem = false, "the map is full"
	var text strings.Builder
	if err := WriteTable(&text, d, false); err != nil || !strings.Contains(text.String(), "do NOT hold the plan: the map is full") {
		t.Errorf("%v: %s", err, text.String())
	}
}

// The document comes back from JSON as it was.
func TestJSON(t *testing.T) {
	text, err := json.MarshalIndent(document(), "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "testdata/document.json", string(text)+"\n")
	var back Document
	if err := json.Unmarshal(text, &back); err != nil {
		t.Fatal(err)
	}
	again, err := json.MarshalIndent(back, "", "  ")
	if err != nil || string(again) != string(text) {
		t.Errorf("%v: came back as\n%s", err, again)
	}
}

func TestMetrics(t *testing.T) {
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(Collector{Read: document})
	want, err := os.Open("testdata/metrics.txt")
	if err != nil {
		t.Fatal(err)
	}
	defer want.Close()
	if err := testutil.GatherAndCompare(registry, want); err != nil {
		t.Error(err)
	}
	problems, err := testutil.GatherAndLint(registry)
	if err != nil || len(problems) > 0 {
		t.Errorf("%v %v", err, problems)
	}
}

// Every explanation says what a drop means, and what to do.
func TestExplanations(t *testing.T) {
	for name, e := range Explanations {
		if e.Means == "" || e.Remedy == "" {
			t.Errorf("%s: %+v", name, e)
		}
	}
}
