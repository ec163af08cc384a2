// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"fairlead.dev/fairlead/internal/agent"
	"fairlead.dev/fairlead/internal/dataplane"
	"fairlead.dev/fairlead/internal/status"
)

// fairlead runs the program in-process.
func fairlead(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, complaints bytes.Buffer
	root := rootCommand()
	root.SetArgs(args)
	root.SetOut(&out)
	root.SetErr(&complaints)
	code = execute(root)
	return code, out.String(), complaints.String()
}

func TestExitCodes(t *testing.T) {
	bad := filepath.Join(t.TempDir(), "bad.yaml")
	if err := os.WriteFile(bad, []byte("kind: Sevrice\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	none := filepath.Join(t.TempDir(), "none.sock")
	for _, c := range []struct {
		args string
		code int
		says string // on one of both
	}{
		{"lint ../../examples", 0, "0 findings"},
		{"lint " + bad, exitFailed, "FL0005"},
		{"lint -o json " + bad, exitFailed, `"FL0005"`},
		{"lint", exitUsage, "no PATH given"},
		{"lint -o xml ../../examples", exitUsage, "use text or json"},
		{"lint /nowhere", exitFailed, "/nowhere"},
		{"lint --codes", 0, "FL0402"},
		{"nonsense", exitUsage, `unknown command "nonsense"; see fairlead --help`},
		{"statsu", exitUsage, "did you mean status?"},
		{"agent nonsense", exitUsage, "see fairlead agent --help"},
		{"lint --nonsense", exitUsage, "see fairlead lint --help"},
		{"status --socket " + none, exitFailed, "no agent answers on " + none},
		{"status -o xml --socket " + none, exitUsage, "use table, wide, json or yaml"},
		{"trace", exitUsage, "give either"},
		{"trace tcp 192.0.2.1:80", exitUsage, "give either"},
		{"trace --pcap x tcp 192.0.2.1:80 192.0.2.2:80", exitUsage, "give either"},
		{"trace tcp 192.0.2.1 192.0.2.2:80", exitUsage, "are not two addresses with ports"},
		{"trace tcp --flags FIN 192.0.2.1:80 192.0.2.2:80", exitUsage, "use tcp (SYN or ACK) or udp"},
		{"trace -o xml udp 192.0.2.1:80 192.0.2.2:80", exitUsage, "use text or json"},
		{"trace tcp 192.0.2.1:80 [::1]:80", exitUsage, "of one family"},
		{"trace sctp 192.0.2.1:80 192.0.2.2:80", exitUsage, "use tcp"},
		{"trace --pcap /nowhere", exitFailed, "open the capture"},
		{"trace --socket " + none + " udp 192.0.2.1:80 192.0.2.2:80", exitFailed, "start one with fairlead agent"},
		{"simulate", exitUsage, "see fairlead simulate --help"},
		{"simulate --socket " + none + " x", exitFailed, "no agent answers"},
		{"simulate -o xml x", exitUsage, "use table or json"},
		{"drain", exitUsage, "see fairlead drain --help"},
		{"drain --socket " + none + " worker-1", exitFailed, "no agent answers"},
		{"agent", exitUsage, "--config is missing"},
		{"agent --config /nowhere", exitUsage, "read the configuration"},
		{"keys", exitUsage, "see fairlead keys --help"},
		{"keys --dir " + t.TempDir() + " ../x", exitUsage, "is not a node's name"},
		{"version", 0, version},
		{"completion bash", 0, "bash completion"},
		{"--help", 0, "fairlead demo"},
	} {
		t.Run(c.args, func(t *testing.T) {
			code, out, complaints := fairlead(t, strings.Fields(c.args)...)
			if code != c.code || !strings.Contains(out+complaints, c.says) {
				t.Errorf("exit code %d, want %d with %q\nstdout: %s\nstderr: %s", code, c.code, c.says, out, complaints)
			}
		})
	}
}

// Keys are made once, for root alone, and never over another.
func TestKeys(t *testing.T) {
	dir := t.TempDir()
	code, first, complaints := fairlead(t, "keys", "--dir", dir, "lb-1", "worker-1")
	if code != 0 {
		t.Fatal(complaints)
	}
	before := map[string]string{}
	files := append(strings.Fields(first), filepath.Join(dir, "ca.crt"), filepath.Join(dir, "ca.key"), filepath.Join(dir, "tls/lb-1.key"))
	if len(files) != 8 {
		t.Errorf("made %v", files)
	}
	for _, path := range files {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		before[path] = string(text)
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", path, info.Mode(), err)
		}
	}
	if code, _, complaints := fairlead(t, "keys", "--dir", dir, "lb-1", "worker-1", "worker-2"); code != 0 {
		t.Fatal(complaints)
	}
	for path, was := range before {
		if text, err := os.ReadFile(path); err != nil || string(text) != was {
			t.Errorf("%s has changed: %v", path, err)
		}
	}
	if err := os.Remove(filepath.Join(dir, "ca.key")); err != nil {
		t.Fatal(err)
	}
	if code, _, complaints := fairlead(t, "keys", "--dir", dir, "worker-3"); code == 0 || !strings.Contains(complaints, "put it back") {
		t.Errorf("without the authority's key: %d, %s", code, complaints)
	}
}

// capture is a pcap file of frames.
func capture(order binary.ByteOrder, magic, link uint32, frames ...[]byte) []byte {
	head := make([]byte, 24)
	order.PutUint32(head, magic)
	order.PutUint32(head[20:], link)
	for _, frame := range frames {
		record := make([]byte, 16)
		order.PutUint32(record[8:], uint32(len(frame)))
		order.PutUint32(record[12:], uint32(len(frame)))
		head = append(append(head, record...), frame...)
	}
	return head
}

func TestReadPcap(t *testing.T) {
	frames := [][]byte{[]byte("some frame of more than 14 bytes"), []byte("and another, shorter")}
	for name, file := range map[string][]byte{
		"little": capture(binary.LittleEndian, 0xa1b2c3d4, 1, frames...), "big": capture(binary.BigEndian, 0xa1b2c3d4, 1, frames...),
		"nanoseconds": capture(binary.LittleEndian, 0xa1b23c4d, 1, frames...), "nanoseconds, big": capture(binary.BigEndian, 0xa1b23c4d, 1, frames...),
	} {
		got, err := readPcap(bytes.NewReader(file))
		if err != nil || !slices.EqualFunc(got, frames, bytes.Equal) {
			t.Errorf("%s: %q, %v", name, got, err)
		}
		for cut := range len(file) {
			got, err := readPcap(bytes.NewReader(file[:cut]))
			if whole := cut == 24 || cut == 24+16+len(frames[0]); (err == nil) != whole || len(got) > 1 {
				t.Errorf("%s, %d bytes of it: %d frames, %v", name, cut, len(got), err)
			}
		}
	}
	huge := capture(binary.LittleEndian, 0xa1b2c3d4, 1, frames[0])
	binary.LittleEndian.PutUint32(huge[24+8:], 1<<31)
	for says, file := range map[string][]byte{
		"convert it": []byte("\x0a\x0d\x0d\x0a this is the other format, pcapng"),
		"link type":  capture(binary.LittleEndian, 0xa1b2c3d4, 101),
		"bytes":      huge,
	} {
		if _, err := readPcap(bytes.NewReader(file)); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%v, want %q", err, says)
		}
	}
}

func TestWriteTrace(t *testing.T) {
	d := status.Document{Services: []status.Service{{Namespace: "default", Name: "web", VIP: "192.0.2.1", Port: 80, Protocol: "TCP", Slots: 256}}}
	trace := dataplane.Trace{Source: netip.MustParseAddrPort("198.51.100.7:4000"), Destination: netip.MustParseAddrPort("192.0.2.1:80"), Protocol: 6, Family: 4,
		Service: 1, Slot: 7, Hash: 0xff, Backend: 3, Target: netip.MustParseAddrPort("10.1.0.5:8080"), NextHop: 2, Interface: 4, Verb: "question", Attempt: 2, Verdict: "forward"}
	for want, edit := range map[string]func(*dataplane.Trace){
		`parsed as  IPv4, protocol 6, 198.51.100.7:4000 to 192.0.2.1:80
service    default/web
slot       7 of 256 (hash 00000000000000ff)
backend    10.1.0.5:8080
sent as    a question: is the flow yours? Candidate 1 of the contested slot is asked
next hop   row 2, device 4
verdict    forward
`: func(*dataplane.Trace) {},
		`parsed as  IPv4, protocol 6, 198.51.100.7:4000 to 192.0.2.1:80 (SYN)
verdict    drop, no_service: for a VIP, but no Service has this port and protocol; compare the Service's ports with what clients use
`: func(t *dataplane.Trace) {
			t.Service, t.Backend, t.NextHop, t.Flags, t.Verdict, t.Drop = 0, 0, 0, []string{"SYN"}, "drop", "no_service"
		},
	} {
		changed := trace
		edit(&changed)
		var text strings.Builder
		if err := writeTrace(&text, d, changed, "text"); err != nil || text.String() != want {
			t.Errorf("%v:\n%s\nwant\n%s", err, text.String(), want)
		}
	}
}

func TestWriteSimulation(t *testing.T) {
	var text strings.Builder
	err := writeSimulation(&text, []agent.Simulation{
		{Service: "default/web", Address: "192.0.2.1:80/TCP", SlotsNow: 256, SlotsThen: 1024, Moved: 0.25, Flows: 1000, Concerned: 240},
		{Service: "default/dns", Address: "192.0.2.1:53/UDP", SlotsNow: 256, SlotsThen: 256, Flows: 7, Break: 7, Reason: "1 backends go"},
	}, "table")
	const want = `SERVICE      ADDRESS           SLOTS        MOVES  FLOWS  CONCERNED  BREAK  REASON
default/web  192.0.2.1:80/TCP  256 -> 1024  25.0%  1000   240        0      
default/dns  192.0.2.1:53/UDP  256          0.0%   7      0          7      1 backends go
`
	if err != nil || text.String() != want {
		t.Errorf("%v:\n%s\nwant\n%s", err, text.String(), want)
	}
}

// Waiting ends when no backend of the name takes new flows or has any.
func TestAwaitDrained(t *testing.T) {
	three, zero := uint32(3), uint32(0)
	backend := func(state string, flows *uint32) status.Document {
		return status.Document{Services: []status.Service{{Backends: []status.Backend{
			{Address: "10.1.0.5:8080", Node: "worker-1", State: state, Flows: flows}, {Address: "10.1.0.50:8080", Node: "worker-2", State: "active"}}}}}
	}
	for _, name := range []string{"worker-1", "10.1.0.5", "10.1.0.5:8080"} {
		documents := []status.Document{backend("active", nil), backend("draining", nil), backend("draining", &three), backend("draining", &three), backend("draining", &zero)}
		var text strings.Builder
		err := awaitDrained(&text, name, time.Minute, 0, func() (status.Document, error) {
			d := documents[0]
			documents = documents[1:]
			return d, nil
		})
		want := name + ": 1 backends, 1 still take new flows, 0 have not said what they have, 0 flows left\n" +
			name + ": 1 backends, 0 still take new flows, 1 have not said what they have, 0 flows left\n" +
			name + ": 1 backends, 0 still take new flows, 0 have not said what they have, 3 flows left\n" +
			name + ": 1 backends, 0 still take new flows, 0 have not said what they have, 0 flows left\n"
		if err != nil || text.String() != want || len(documents) > 0 {
			t.Errorf("%v:\n%s\nwant\n%s", err, text.String(), want)
		}
	}
	err := awaitDrained(&strings.Builder{}, "worker-1", 0, 0, func() (status.Document, error) { return backend("draining", &three), nil })
	if err == nil || !strings.Contains(err.Error(), "not drained in time") {
		t.Error(err)
	}
}
