// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/cilium/ebpf"

	"fairlead.dev/fairlead/internal/need"
)

// An independent decoder finds the layers that were meant, and every checksum
// and length right.
func TestTsharkDecodes(t *testing.T) {
	tshark := need.Tool(t, "tshark")
	for _, p := range paths {
		t.Run(p.name, func(t *testing.T) {
			n, _ := p.one(t, nil, ingress, 1500, 9)
			var frames [][]byte
			for _, kind := range []string{"tcp", "syn", "udp"} {
				_, out := n.run(fromRouter(p.packet(kind, []byte("odd"))))
				frames = append(frames, out)
			}
			for _, line := range decode(t, tshark, frames) {
				p.check(t, line)
			}
		})
	}
}

// What is sent without a tunnel: in mode L2, in mode NAT in both directions, and
// answers with SYN cookies.
func TestTsharkDecodesPlainFrames(t *testing.T) {
	tshark := need.Tool(t, "tshark")
	ns, index, _, _ := routed(t)
	for i, p := range natPaths {
		var frames [][]byte
		l2, _ := l2Paths[i].one(t, nil, ingress, 1500, 9)
		nat, _ := p.nat(t, 9)
		for _, kind := range []string{"syn", "tcp", "udp"} {
			proto := uint8(protoTCP)
			if kind == "udp" {
				proto = protoUDP
			}
			_, held := l2.run(fromRouter(p.packet(kind, []byte("odd"))))
			_, there := nat.run(fromRouter(p.packet(kind, []byte("odd"))))
			_, back := nat.run(ether(ownMAC, workerMAC, p.between(kind, p.backendEnd(), p.localEnd(proto, 0), tcpACK, []byte("odd")).bytes()))
			frames = append(frames, held, there, back)
		}
		worker := paths[3+i] // geneve, of the same family
		flood := flooded(t, worker, bpfFlood{Through: uint64(coarseClock(t))})
		frame := worker.tunnelled("syn", nil)
		options := ebpf.RunOptions{Data: frame, DataOut: make([]byte, len(frame)+256), Context: xdpContext{DataEnd: uint32(len(frame)), IngressIfindex: index}}
		must(t, ns.Do(func() error { _, err := flood.FairleadXdp.Run(&options); return err }))
		frames = append(frames, options.DataOut)
		for _, line := range decode(t, tshark, frames) {
			transport := line.get("tcp.checksum.status") + line.get("udp.checksum.status")
			ip, family := line.get("ip.checksum.status"), ":ip:"
			if p.vip.Is6() {
				ip, family = "1", ":ipv6:"
			}
			if transport != "1" || ip != "1" || line.get("_ws.malformed") != "" || !strings.Contains(line.get("frame.protocols"), family) {
				t.Errorf("%s: decoded as %v", p.name, line)
			}
		}
	}
}

// The replies that the LB node makes itself.
func TestTsharkDecodesReplies(t *testing.T) {
	tshark := need.Tool(t, "tshark")
	for _, p := range []path{paths[0], paths[1]} {
		t.Run(p.name, func(t *testing.T) {
			n, _ := p.one(t, nil, ingress, 1500, 0)
			last := p.packet("udp", []byte("odd"))
			last.ttl = 1
			_, expired := n.run(fromRouter(last))
			_, large := n.run(fromRouter(p.packet("tcp", make([]byte, 1450))))
			for _, line := range decode(t, tshark, [][]byte{expired, large}) {
				if line.get("icmp.checksum.status")+line.get("icmpv6.checksum.status") != "1" {
					t.Errorf("checksum of %v", line)
				}
				if !strings.Contains(line.get("frame.protocols"), ":icmp") || line.get("_ws.malformed") != "" {
					t.Errorf("decoded as %v", line)
				}
			}
		})
	}
}

func (p path) check(t *testing.T, line decoded) {
	t.Helper()
	protocols, outer, inner := line.get("frame.protocols"), ":ip:", ":ip:"
	if p.tunnel.Is6() {
		outer = ":ipv6:"
	}
	if p.client.Is6() {
		inner = ":ipv6:"
	}
	want := "eth:ethertype:vlan:ethertype" + outer
	if p.mode == bpfModeMODE_GENEVE {
		want += "udp:geneve" + inner
		if line.get("geneve.vni") != strconv.Itoa(testVNI) && line.get("geneve.vni") != "0x010203" {
			t.Errorf("VNI %q", line.get("geneve.vni"))
		}
	} else {
		want += inner[1:]
	}
	if !strings.HasPrefix(protocols, want) {
		t.Errorf("protocols %q, want %q", protocols, want)
	}
	if line.get("_ws.malformed") != "" {
		t.Errorf("malformed: %v", line)
	}
	headers := strings.Count(outer+inner, ":ip:")
	if got := line.get("ip.checksum.status"); strings.Count(got, "1") != headers || strings.ContainsAny(got, "02") {
		t.Errorf("IP checksums %q of %d headers", got, headers)
	}
	// The inner packet's is 1, good. The outer UDP's is 3, not present, or over
	// IPv6 4, illegal but for tunnels, which RFC 6935 allows it.
	absent := "3"
	if p.tunnel.Is6() && p.mode == bpfModeMODE_GENEVE {
		absent = "4"
	}
	transport := strings.Split(line.get("tcp.checksum.status")+","+line.get("udp.checksum.status"), ",")
	transport = slices.DeleteFunc(transport, func(s string) bool { return s == "" || s == absent })
	if !slices.Equal(transport, []string{"1"}) {
		t.Errorf("transport checksums %q", transport)
	}
	for field, want := range map[string]string{"ip.dst": p.vip.String(), "ipv6.dst": p.vip.String()} {
		if got := line.get(field); strings.HasPrefix(field, "ipv6") == p.vip.Is6() && !strings.HasSuffix(got, want) {
			t.Errorf("%s %q does not end in %s", field, got, want)
		}
	}
}

// decoded is the fields of one frame.
type decoded []string

var decodedFields = []string{"frame.protocols", "ip.checksum.status", "tcp.checksum.status", "udp.checksum.status",
	"icmp.checksum.status", "icmpv6.checksum.status", "geneve.vni", "ip.dst", "ipv6.dst", "_ws.malformed"}

func (d decoded) get(field string) string {
	if i := slices.Index(decodedFields, field); i < len(d) {
		return d[i]
	}
	return ""
}

func decode(t *testing.T, tshark string, frames [][]byte) (lines []decoded) {
	t.Helper()
	le := binary.LittleEndian
	file := le.AppendUint32(nil, 0xa1b2c3d4)
	file = le.AppendUint32(file, 2|4<<16)
	file = append(file, make([]byte, 8)...)
	file = le.AppendUint32(le.AppendUint32(file, 65535), 1)
	for _, frame := range frames {
		file = append(file, make([]byte, 8)...)
		file = le.AppendUint32(le.AppendUint32(file, uint32(len(frame))), uint32(len(frame)))
		file = append(file, frame...)
	}
	name := filepath.Join(t.TempDir(), "frames.pcap")
	if err := os.WriteFile(name, file, 0o600); err != nil {
		t.Fatal(err)
	}
	args := []string{"-n", "-r", name, "-d", "udp.port==6082,geneve", "-T", "fields", "-E", "separator=/t",
		"-o", "ip.check_checksum:TRUE", "-o", "tcp.check_checksum:TRUE", "-o", "udp.check_checksum:TRUE"}
	for _, field := range decodedFields {
		args = append(args, "-e", field)
	}
	cmd := exec.Command(tshark, args...)
	var complaints strings.Builder
	cmd.Stderr = &complaints
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %s", err, complaints.String())
	}
	for line := range strings.Lines(string(out)) {
		lines = append(lines, strings.Split(strings.TrimRight(line, "\n"), "\t"))
	}
	if len(lines) != len(frames) {
		t.Fatalf("%d frames decoded of %d", len(lines), len(frames))
	}
	return lines
}
