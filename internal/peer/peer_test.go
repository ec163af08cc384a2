// SPDX-License-Identifier: Apache-2.0

package peer

import (
	"context"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"fairlead.dev/fairlead/internal/lb"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// identities are those of nodes, signed by one authority.
func identities(t *testing.T, nodes ...string) map[string]*Identity {
	t.Helper()
	authority, ca, key, err := NewAuthority(time.Now())
	must(t, err)
	_, err = ParseAuthority(ca, key)
	must(t, err)
	dir, all := t.TempDir(), map[string]*Identity{}
	must(t, os.WriteFile(filepath.Join(dir, "ca"), ca, 0o600))
	for _, node := range nodes {
		certificate, key, err := authority.Issue(node, time.Now())
		must(t, err)
		must(t, os.WriteFile(filepath.Join(dir, "crt"), certificate, 0o600))
		must(t, os.WriteFile(filepath.Join(dir, "key"), key, 0o600))
		all[node], err = LoadIdentity(filepath.Join(dir, "crt"), filepath.Join(dir, "key"), filepath.Join(dir, "ca"))
		must(t, err)
		if got := all[node].Name(); got != node {
			t.Errorf("the identity names %q, want %q", got, node)
		}
	}
	return all
}

// source is a node that answers a census, and remembers what it is told.
type source struct {
	answer func([]Question) ([][]Answer, error)
	told   chan []Record
	judged chan []Verdict
}

func (s source) MayAsk(node string) bool                         { return strings.HasPrefix(node, "lb-") }
func (s source) Census(questions []Question) ([][]Answer, error) { return s.answer(questions) }
func (s source) Record(records []Record) error                   { s.told <- records; return nil }
func (s source) Judge(verdicts []Verdict) error                  { s.judged <- verdicts; return nil }

// serve answers as a node, and returns where.
func serve(t *testing.T, identity *Identity, answer func([]Question) ([][]Answer, error)) netip.AddrPort {
	t.Helper()
	return serveNode(t, identity, source{answer: answer})
}

func serveNode(t *testing.T, identity *Identity, node Node) netip.AddrPort {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() {
		done <- Serve(ctx, listener, identity, node)
	}()
	t.Cleanup(func() {
		cancel()
		must(t, <-done)
	})
	return netip.MustParseAddrPort(listener.Addr().String())
}

var question = Question{Frontend: netip.MustParseAddrPort("192.0.2.1:80"), Protocol: lb.TCP, Bits: 8,
	Targets: []netip.AddrPort{netip.MustParseAddrPort("10.1.0.5:8080"), netip.MustParseAddrPort("[fd01::5]:8080")}}

func TestAsk(t *testing.T) {
	ids := identities(t, "lb-1", "worker-1", "worker-2")
	calls := 0
	want := [][]Answer{{{Flows: 3, Owns: []uint64{1, 0, 1 << 63, 0}}, {Owns: make([]uint64, 4)}}}
	at := serve(t, ids["worker-1"], func(questions []Question) ([][]Answer, error) {
		calls++
		if !reflect.DeepEqual(questions, []Question{question}) {
			t.Errorf("asked %v", questions)
		}
		return want, nil
	})
	client := NewClient(ids["lb-1"])
	for range 3 { // the second and third time, nothing has changed
		got, err := client.Ask(t.Context(), "worker-1", at, []Question{question})
		must(t, err)
		if !reflect.DeepEqual(got, want) {
			t.Errorf("answered %v, want %v", got, want)
		}
	}
	if calls != 3 {
		t.Errorf("asked %d times", calls)
	}
	want = [][]Answer{{{Flows: 1, Owns: []uint64{0, 5, 0, 0}}, {Owns: make([]uint64, 4)}}}
	got, err := client.Ask(t.Context(), "worker-1", at, []Question{question})
	must(t, err)
	if !reflect.DeepEqual(got, want) {
		t.Errorf("answered %v, want %v", got, want)
	}
}

func TestNobodyElse(t *testing.T) {
	ids := identities(t, "lb-1", "worker-1", "worker-2")
	foreign := identities(t, "lb-1")
	at := serve(t, ids["worker-1"], func([]Question) ([][]Answer, error) {
		return [][]Answer{{{Owns: make([]uint64, 4)}, {Owns: make([]uint64, 4)}}}, nil
	})
	for _, c := range []struct {
		name, node string
		identity   *Identity
	}{
		{"a worker asks", "worker-1", ids["worker-2"]},
		{"another authority's LB node asks", "worker-1", foreign["lb-1"]},
		{"another node answers", "worker-2", ids["lb-1"]},
	} {
		t.Run(c.name, func(t *testing.T) {
			if _, err := NewClient(c.identity).Ask(t.Context(), c.node, at, []Question{question}); err == nil {
				t.Error("answered")
			}
		})
	}
}

func TestTooMuch(t *testing.T) {
	ids := identities(t, "lb-1", "worker-1")
	at := serve(t, ids["worker-1"], func([]Question) ([][]Answer, error) {
		t.Error("the source was asked")
		return nil, nil
	})
	large, many := question, question
	large.Bits = MaxBits + 1
	many.Targets = make([]netip.AddrPort, maxTargets+1)
	for i := range many.Targets {
		many.Targets[i] = question.Targets[0]
	}
	for _, q := range []Question{large, many} {
		if _, err := NewClient(ids["lb-1"]).Ask(t.Context(), "worker-1", at, []Question{q}); err == nil || !strings.Contains(err.Error(), "400") {
			t.Errorf("error %v", err)
		}
	}
}

// What is written comes back, few slots or many; and nothing that is cut off
// or made up is believed to be an answer.
func TestEncoding(t *testing.T) {
	random := rand.New(rand.NewPCG(5, 6))
	for range 3000 {
		q := Question{Bits: uint8(MinBits + random.IntN(4)), Targets: make([]netip.AddrPort, random.IntN(4))}
		answers := make([]Answer, len(q.Targets))
		for i := range answers {
			answers[i] = Answer{Flows: random.Uint32(), Owns: make([]uint64, 1<<(q.Bits-6))}
			for range random.IntN(1 << random.IntN(11)) {
				at := random.IntN(1 << q.Bits)
				answers[i].Owns[at/64] |= 1 << (at % 64)
			}
		}
		text := encode([][]Answer{answers})
		got, err := decode(text, []Question{q})
		if err != nil || !reflect.DeepEqual(got[0], answers) {
			t.Fatalf("%v comes back as %v, %v", answers, got, err)
		}
		if len(text) > 0 {
			if _, err := decode(text[:random.IntN(len(text))], []Question{q}); err == nil {
				t.Fatal("an answer that is cut off is believed")
			}
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte{1, 1, 5}, uint8(8))
	f.Fuzz(func(t *testing.T, text []byte, width uint8) {
		if width < MinBits || width > 12 {
			return
		}
		answers, err := decode(text, []Question{{Bits: width, Targets: make([]netip.AddrPort, 2)}})
		if err == nil && len(answers[0][0].Owns) != 1<<(width-6) {
			t.Errorf("%d words", len(answers[0][0].Owns))
		}
	})
}

func TestTell(t *testing.T) {
	ids := identities(t, "lb-1", "lb-2", "worker-1")
	node := source{told: make(chan []Record, 8), judged: make(chan []Verdict, 8)}
	at := serveNode(t, ids["lb-2"], node)
	records := make([]Record, MaxRecords+1)
	for i := range records {
		records[i] = Record{uint64(i) << 40, question.Targets[0]}
	}
	must(t, NewClient(ids["lb-1"]).Tell(t.Context(), "lb-2", at, records))
	if got := append(<-node.told, <-node.told...); !reflect.DeepEqual(got, records) {
		t.Errorf("%d records arrived, or others", len(got))
	}
	if err := NewClient(ids["worker-1"]).Tell(t.Context(), "lb-2", at, records[:1]); err == nil {
		t.Error("a worker was believed")
	}
	verdicts := []Verdict{{Namespace: "d", Name: "s", Target: question.Targets[0], Protocol: lb.TCP, Problem: "refused"}}
	must(t, NewClient(ids["lb-1"]).TellVerdicts(t.Context(), "lb-2", at, verdicts))
	if got := <-node.judged; !reflect.DeepEqual(got, verdicts) {
		t.Errorf("%+v arrived", got)
	}
	if err := NewClient(ids["worker-1"]).TellVerdicts(t.Context(), "lb-2", at, verdicts); err == nil {
		t.Error("a worker's verdict was believed")
	}
}
