// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sigs.k8s.io/yaml"

	"fairlead.dev/fairlead/internal/agent"
	"fairlead.dev/fairlead/internal/dataplane"
	"fairlead.dev/fairlead/internal/lb"
	"fairlead.dev/fairlead/internal/status"
)

// expect compares all that a command did.
func expect(t *testing.T, args string, wantCode int, wantOut, wantErr string) {
	t.Helper()
	code, out, complaints := fairlead(t, strings.Fields(args)...)
	if code != wantCode || out != wantOut || complaints != wantErr {
		t.Errorf("fairlead %s: exit code %d, want %d\nstdout:\n%s\nwant\n%s\nstderr:\n%s\nwant\n%s", args, code, wantCode, out, wantOut, complaints, wantErr)
	}
}

func write(t *testing.T, name, text string) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestLintOutput(t *testing.T) {
	const good = "../../examples/small.yaml"
	expect(t, "lint "+good, 0, "", "1 services, 3 nodes, 1 pools; 0 findings\n")
	expect(t, "lint -o json "+good, 0, "[]\n", "")
	expect(t, "lint /nowhere", exitFailed,
		"/nowhere: error: FL0001 file: stat /nowhere: no such file or directory; correct the path or its rights\n",
		"0 services, 0 nodes, 0 pools; 1 findings\n")

	text, err := os.ReadFile(good)
	if err != nil {
		t.Fatal(err)
	}
	bad := write(t, "bad.yaml", strings.Replace(string(text), `tunnelAddresses: [10.0.0.12, "fd00::12"]`, `tunnelAddresses: [10.0.0.300]`, 1))
	code, out, _ := fairlead(t, "lint", "-o", "json", bad)
	var findings []lb.Finding
	if err := json.Unmarshal([]byte(out), &findings); err != nil {
		t.Fatal(err)
	}
	if code != exitFailed || len(findings) != 1 || findings[0].Severity != lb.Error || findings[0].Object != "Node worker-2" ||
		findings[0].Remedy == "" || !strings.Contains(findings[0].Problem, "10.0.0.300") {
		t.Errorf("exit code %d, %+v", code, findings)
	}
	// What only a plan misses.
	missing := write(t, "missing.yaml", strings.Replace(string(text), "podSubnets: [10.244.2.0/24, ", "podSubnets: [10.244.3.0/24, ", 1))
	code, out, _ = fairlead(t, "lint", missing)
	if code != exitFailed || !strings.Contains(out, "warning: FL0402") || strings.Count(out, "10.244.2.2:8080") != 1 {
		t.Errorf("of a Pod on no node: exit code %d,\n%s", code, out)
	}
}

// A wrong name makes nothing, and half of a pair is never completed with half
// of another.
func TestKeysMakeNothingByHalves(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "keys")
	for _, name := range []string{"", "a/b", ".", "..", ".hidden"} {
		if code, _, complaints := fairlead(t, "keys", "--dir", dir, "lb-1", name); code != exitUsage || !strings.Contains(complaints, "is not a node's name") {
			t.Errorf("%q: %d, %s", name, code, complaints)
		}
	}
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("%s was made: %v", dir, err)
	}
	if code, _, complaints := fairlead(t, "keys", "--dir", dir, "lb-1"); code != 0 {
		t.Fatal(complaints)
	}
	for _, sub := range []string{"", "tags", "tls"} {
		if info, err := os.Stat(filepath.Join(dir, sub)); err != nil || info.Mode().Perm() != 0o700 {
			t.Errorf("directory %q: %v, %v", sub, info.Mode(), err)
		}
	}
	for _, certificate := range []string{"tls/lb-1.crt", "ca.crt"} {
		path := filepath.Join(dir, certificate)
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		code, _, complaints := fairlead(t, "keys", "--dir", dir, "lb-1")
		if code != exitFailed || !strings.Contains(complaints, "not its certificate "+path+"; put it back") {
			t.Errorf("without %s: %d, %s", certificate, code, complaints)
		}
		if _, err := os.Stat(path); !os.IsNotExist(err) {
			t.Errorf("%s was made for an older key: %v", path, err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "shard.secret"), []byte("short"), 0o600); err != nil {
		t.Fatal(err)
	}
	if code, _, complaints := fairlead(t, "keys", "--dir", dir, "lb-1"); code != exitFailed || !strings.Contains(complaints, "remove it to make another") {
		t.Errorf("with a wrong secret: %d, %s", code, complaints)
	}
}

// standInAgent answers on a socket in place of an agent.
func standInAgent(t *testing.T, handlers map[string]http.HandlerFunc) (socket string) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "s")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	for pattern, handler := range handlers {
		mux.HandleFunc(pattern, handler)
	}
	server := &http.Server{Handler: mux, ReadHeaderTimeout: time.Second}
	go server.Serve(listener)
	t.Cleanup(func() { server.Close() })
	return socket
}

func answer(t *testing.T, value any) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		if err := json.NewEncoder(w).Encode(value); err != nil {
			t.Error(err)
		}
	}
}

func TestStatusOutput(t *testing.T) {
	begin := time.Unix(1_000_000, 0).UTC()
	d := status.Document{Node: "lb-1", Version: "v1", Roles: []string{"LoadBalancer"}, Since: begin, Now: begin.Add(time.Minute), Problem: "the map is full"}
	socket := standInAgent(t, map[string]http.HandlerFunc{"GET /v1/status": answer(t, d)})
	const table = "Node lb-1 (LoadBalancer), version v1, agent up 1m0s\nThe maps do NOT hold the plan: the map is full\n"
	expect(t, "status --socket "+socket, 0, table, "")
	expect(t, "status -o wide --socket "+socket, 0, table, "")
	for output, decode := range map[string]func([]byte, any) error{
		"json": json.Unmarshal,
		"yaml": func(text []byte, to any) error { return yaml.Unmarshal(text, to) },
	} {
		code, out, complaints := fairlead(t, "status", "-o", output, "--socket", socket)
		var back status.Document
		if err := decode([]byte(out), &back); err != nil || code != 0 || back.Problem != d.Problem || !back.Now.Equal(d.Now) {
			t.Errorf("%s: %d, %v\n%s%s", output, code, err, out, complaints)
		}
	}
}

// What the agent says, and that there is none, is told in one line.
func TestAgentsComplaints(t *testing.T) {
	socket := standInAgent(t, map[string]http.HandlerFunc{"GET /v1/status": func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, "no plan yet; correct the objects", http.StatusServiceUnavailable)
	}})
	expect(t, "status --socket "+socket, exitFailed, "", "fairlead: the agent says: no plan yet; correct the objects\n")

	// A socket that an agent left when it was killed.
	left := filepath.Join(t.TempDir(), "s")
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: left, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	listener.SetUnlinkOnClose(false)
	listener.Close()
	for _, path := range []string{left, filepath.Join(t.TempDir(), "none")} {
		for _, command := range []string{"status", "trace udp 192.0.2.7:9 192.0.2.1:53", "simulate x", "drain worker-1"} {
			expect(t, command+" --socket "+path, exitFailed, "",
				"fairlead: no agent answers on "+path+"; start one with fairlead agent --config FILE, or name its socket with --socket\n")
		}
	}
}

// Frames of a capture, or of the words of a command, reach the agent as they are.
func TestTraceSendsFrames(t *testing.T) {
	var got [][]byte
	socket := standInAgent(t, map[string]http.HandlerFunc{
		"GET /v1/status": answer(t, status.Document{}),
		"POST /v1/trace": func(w http.ResponseWriter, r *http.Request) {
			var request agent.TraceRequest
			if err := json.NewDecoder(r.Body).Decode(&request); err != nil || request.Interface != "eth7" {
				t.Errorf("%+v, %v", request, err)
			}
			got = append(got, request.Frame)
			answer(t, dataplane.Trace{Verdict: "pass"})(w, r)
		},
	})
	const one = "parsed as  neither IPv4 nor IPv6\nverdict    pass\n"
	frames := [][]byte{[]byte("some frame of more than 14 bytes"), []byte("and another, shorter")}
	pcap := write(t, "x.pcap", string(capture(binary.BigEndian, 0xa1b2c3d4, 1, frames...)))
	expect(t, "trace --interface eth7 --socket "+socket+" --pcap "+pcap, 0, one+one, "")
	if len(got) != 2 || !bytes.Equal(got[0], frames[0]) || !bytes.Equal(got[1], frames[1]) {
		t.Errorf("sent %q", got)
	}

	for command, want := range map[string]string{
		// Ethernet, IP, ports, flags.
		"tcp 192.0.2.7:258 192.0.2.1:80": "000000000000 000000000000 0800 4500 0028 0000 0000 4006 0000 c0000207 c0000201 0102 0050 00000000 00000000 5002 0000 0000 0000",
		"udp [2001:db8::7]:258 [2001:db8::1]:53": "000000000000 000000000000 86dd 60000000 0008 1140 20010db8000000000000000000000007 20010db8000000000000000000000001 " +
			"0102 0035 0008 0000",
		"tcp --flags ACK 192.0.2.7:258 192.0.2.1:80": "000000000000 000000000000 0800 4500 0028 0000 0000 4006 0000 c0000207 c0000201 0102 0050 00000000 00000000 5010 0000 0000 0000",
	} {
		got = nil
		expect(t, "trace --interface eth7 --socket "+socket+" "+command, 0, one, "")
		if len(got) != 1 || !bytes.Equal(got[0], fromHex(t, want)) {
			t.Errorf("%s: sent %x\nwant %s", command, got, want)
		}
	}

	// Of a capture that is cut, nothing is traced.
	got = nil
	cut := write(t, "cut.pcap", string(capture(binary.LittleEndian, 0xa1b2c3d4, 1, frames...)[:24+16+len(frames[0])+20]))
	expect(t, "trace --socket "+socket+" --pcap "+cut, exitFailed, "", "fairlead: read packet 2 of the capture: unexpected EOF\n")
	if got != nil {
		t.Errorf("sent %q", got)
	}
	// A section header block of pcapng.
	other := write(t, "x.pcapng", "\x0a\x0d\x0d\x0a\x1c\x00\x00\x00\x4d\x3c\x2b\x1a\x01\x00\x00\x00\xff\xff\xff\xff\xff\xff\xff\xff\x1c\x00\x00\x00")
	expect(t, "trace --socket "+socket+" --pcap "+other, exitFailed, "",
		"fairlead: read the capture: not classic pcap; convert it with: editcap -F pcap IN OUT\n")
	none := write(t, "none.pcap", string(capture(binary.LittleEndian, 0xa1b2c3d4, 1)))
	expect(t, "trace --socket "+socket+" --pcap "+none, exitFailed, "", "fairlead: the capture holds no packets\n")
}

func TestSimulateAndDrainAskOnce(t *testing.T) {
	var asked agent.SimulateRequest
	var drained agent.DrainRequest
	decode := func(into, say any) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			if err := json.NewDecoder(r.Body).Decode(into); err != nil {
				t.Error(err)
			}
			answer(t, say)(w, r)
		}
	}
	socket := standInAgent(t, map[string]http.HandlerFunc{
		"POST /v1/simulate": decode(&asked, []agent.Simulation{}), "POST /v1/drain": decode(&drained, struct{}{})})
	expect(t, "simulate -o json x.yaml --socket "+socket, 0, "[]\n", "")
	here, err := filepath.Abs("x.yaml")
	if err != nil || len(asked.Paths) != 1 || asked.Paths[0] != here {
		t.Errorf("asked for %v, want %s; %v", asked.Paths, here, err)
	}
	expect(t, "drain --no-wait worker-1 --socket "+socket, 0, "", "")
	if drained != (agent.DrainRequest{Name: "worker-1"}) {
		t.Errorf("asked for %+v", drained)
	}
	expect(t, "drain --undo worker-1 --socket "+socket, 0, "", "")
	if drained != (agent.DrainRequest{Name: "worker-1", Undo: true}) {
		t.Errorf("asked for %+v", drained)
	}
}

func TestCompletionPrintsAScript(t *testing.T) {
	for shell, has := range map[string]string{"bash": "complete -o default", "zsh": "#compdef fairlead", "fish": "complete -c fairlead"} {
		if code, out, complaints := fairlead(t, "completion", shell); code != 0 || !strings.Contains(out, has) || complaints != "" {
			t.Errorf("%s: %d, %q\n%s", shell, code, complaints, out)
		}
	}
	_, out, _ := fairlead(t, "__complete", "sta")
	if !strings.HasPrefix(out, "status\t") {
		t.Errorf("sta is completed to %s", out)
	}
}

// Escape sequences go to terminals alone, and to none with NO_COLOR.
func TestOnTerminal(t *testing.T) {
	terminal, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer terminal.Close()
	file, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	t.Setenv("NO_COLOR", "")
	if !onTerminal(terminal) || onTerminal(file) || onTerminal(&bytes.Buffer{}) {
		t.Errorf("terminal %v, file %v, buffer %v", onTerminal(terminal), onTerminal(file), onTerminal(&bytes.Buffer{}))
	}
	t.Setenv("NO_COLOR", "1")
	if onTerminal(terminal) {
		t.Error("NO_COLOR is not respected")
	}
}

func fromHex(t *testing.T, text string) []byte {
	t.Helper()
	raw, err := hex.DecodeString(strings.ReplaceAll(text, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	return raw
}
