// SPDX-License-Identifier: Apache-2.0

package flowhash

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"
)

// slow is SipHash-c-d over whole words, written from the paper's figures on a
// state of four words in an array.
func slow(key []byte, words []uint64, c, d int) uint64 {
	load := func(b []byte) (x uint64) {
		for i, v := range b[:8] {
			x |= uint64(v) << (8 * i)
		}
		return x
	}
	rot := func(x uint64, n int) uint64 { return x<<n | x>>(64-n) }
	var v [4]uint64
	for i, s := range []string{"somepseu", "dorandom", "lygenera", "tedbytes"} {
		v[i] = load(key[8*(i%2):]) ^ binary.BigEndian.Uint64([]byte(s))
	}
	rounds := func(n int) {
		for range n {
			for _, half := range [][6]int{{0, 1, 13, 2, 3, 16}, {2, 1, 17, 0, 3, 21}} {
				a, b, x, e, f, y := half[0], half[1], half[2], half[3], half[4], half[5]
				v[a] += v[b]
				v[e] += v[f]
				v[b], v[f] = rot(v[b], x)^v[a], rot(v[f], y)^v[e]
				v[a] = rot(v[a], 32)
			}
		}
	}
	for _, w := range words {
		v[3] ^= w
		rounds(c)
		v[0] ^= w
	}
	v[2] ^= 0xff
	rounds(d)
	return v[0] ^ v[1] ^ v[2] ^ v[3]
}

// words is a flow as the bytes of its packet, cut into words.
func words(client, vip netip.Addr, clientPort, vipPort uint16, proto, family uint8) []uint64 {
	b := append(client.AsSlice(), vip.AsSlice()...)
	b = binary.BigEndian.AppendUint16(b, clientPort)
	b = binary.BigEndian.AppendUint16(b, vipPort)
	b = append(b, proto, 0, 0, family)
	var words []uint64
	for ; len(b) > 0; b = b[8:] {
		words = append(words, binary.LittleEndian.Uint64(b))
	}
	return words
}

// TestSlow checks the second implementation with the example of the paper's
// appendix A: SipHash-2-4 of the bytes 00 to 0e under the key 00 to 0f.
func TestSlow(t *testing.T) {
	key := make([]byte, 16)
	for i := range key {
		key[i] = byte(i)
	}
	got := slow(key, []uint64{0x0706050403020100, 0x0f0e0d0c0b0a0908}, 2, 4)
	if want := uint64(0xa129ca6149be45e5); got != want {
		t.Errorf("SipHash-2-4 is %#x, not %#x", got, want)
	}
}

// TestHash compares with the second implementation.
func TestHash(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	for range 2000 {
		var key Key
		var c, v [16]byte
		for i := range key {
			key[i], c[i], v[i] = byte(r.Uint32()), byte(r.Uint32()), byte(r.Uint32())
		}
		client, vip, family := netip.AddrFrom16(c), netip.AddrFrom16(v), uint8(6)
		if r.IntN(2) == 0 {
			client, vip, family = netip.AddrFrom4([4]byte(c[:4])), netip.AddrFrom4([4]byte(v[:4])), 4
		}
		p, q, proto := uint16(r.Uint32()), uint16(r.Uint32()), uint8(r.Uint32())
		got := key.Hash(client, vip, p, q, proto)
		if want := slow(key[:], words(client, vip, p, q, proto, family), 1, 3); got != want {
			t.Fatalf("hash of %v:%d to %v:%d, protocol %d: %#x, not %#x", client, p, vip, q, proto, got, want)
		}
	}
}

// TestHashKnown pins the hash: a change of it moves every flow.
func TestHashKnown(t *testing.T) {
	key := Key{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}
	for _, c := range []struct {
		client, vip string
		want        uint64
	}{
		{"198.51.100.7", "192.0.2.1", 0xa12b82bbf82149a8},
		{"::ffff:198.51.100.7", "192.0.2.1", 0xa12b82bbf82149a8},
		{"2001:db8::7", "2001:db8:1::1", 0x4fb17c30dff1e386},
	} {
		got := key.Hash(netip.MustParseAddr(c.client), netip.MustParseAddr(c.vip), 49152, 443, 6)
		if got != c.want {
			t.Errorf("%s to %s: %#x, not %#x", c.client, c.vip, got, c.want)
		}
	}
}

func TestHashAllocates(t *testing.T) {
	client, vip := netip.MustParseAddr("2001:db8::7"), netip.MustParseAddr("2001:db8:1::1")
	if n := testing.AllocsPerRun(100, func() { Key{}.Hash(client, vip, 1, 2, 6) }); n != 0 {
		t.Errorf("%.0f allocations a hash", n)
	}
}

func TestSecret(t *testing.T) {
	const digits = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"
	s, err := ParseSecret("\n" + strings.ToUpper(digits) + " \n")
	if err != nil {
		t.Fatal(err)
	}
	if s.Hex() != digits {
		t.Errorf("parsed as %s", s.Hex())
	}
	mac := func(label string) []byte {
		raw, _ := hex.DecodeString(digits)
		h := hmac.New(sha256.New, raw)
		h.Write([]byte(label))
		return h.Sum(nil)
	}
	if got, want := s.FlowKey(), mac("fairlead flow hash"); string(got[:]) != string(want[:16]) {
		t.Errorf("flow key is %x, not %x", got[:], want[:16])
	}
	if got, want := s.Tag("worker-1"), mac("fairlead tag worker-1"); string(got[:]) != string(want[:8]) {
		t.Errorf("tag is %x, not %x", got, want[:8])
	}
	if s.Tag("worker-1") == s.Tag("worker-2") {
		t.Error("two nodes have one tag")
	}
}

// TestParse: what is wrong is refused, and what was read is not quoted.
func TestParse(t *testing.T) {
	for _, text := range []string{
		"", "7f", strings.Repeat("7", 63), strings.Repeat("7", 65), strings.Repeat("7z", 32),
		strings.Repeat("0", 64), strings.Repeat("7", 32) + " " + strings.Repeat("7", 31),
	} {
		if _, err := ParseSecret(text); err == nil {
			t.Errorf("secret %q is accepted", text)
		} else if len(text) > 2 && strings.Contains(err.Error(), "7") {
			t.Errorf("error quotes the secret: %v", err)
		}
	}
	if tag, err := ParseTag("0102030405060708\n"); err != nil || tag != [8]byte{1, 2, 3, 4, 5, 6, 7, 8} {
		t.Errorf("tag parsed as %x, %v", tag, err)
	}
	for _, text := range []string{"", "01020304050607", "010203040506070x"} {
		if _, err := ParseTag(text); err == nil {
			t.Errorf("tag %q is accepted", text)
		}
	}
}

func TestNewSecret(t *testing.T) {
	s, err := NewSecret(strings.NewReader(strings.Repeat("s", 32)))
	if err != nil || s.Hex() != strings.Repeat("73", 32) {
		t.Errorf("secret is %s, %v", s.Hex(), err)
	}
	if _, err := NewSecret(strings.NewReader("short")); err == nil {
		t.Error("a short read makes a secret")
	}
}

// TestRedacted prints a secret and a key in every way that logs do.
func TestRedacted(t *testing.T) {
	s := Secret{0xc0, 0xff, 0xee}
	key := s.FlowKey()
	holder := struct {
		Secret Secret
		Key    Key
		Both   []any
	}{s, key, []any{s, &s, key}}
	var out strings.Builder
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%x", "%X", "%d", "%q", "%o", "%b"} {
		fmt.Fprintf(&out, verb+"\n", s)
		fmt.Fprintf(&out, verb+"\n", key)
		fmt.Fprintf(&out, verb+"\n", &s)
		fmt.Fprintf(&out, verb+"\n", holder)
	}
	for _, h := range []slog.Handler{slog.NewTextHandler(&out, nil), slog.NewJSONHandler(&out, nil)} {
		slog.New(h).Info("", "secret", s, "key", key, "holder", holder, "pointer", &s)
	}
	b, err := json.Marshal(holder)
	out.Write(b)
	out.WriteString(errors.Join(err, fmt.Errorf("%w: %v", errors.ErrUnsupported, s)).Error())
	text := strings.ToLower(out.String())
	for _, bytes := range [][]byte{s[:3], key[:3]} {
		for _, leak := range []string{
			hex.EncodeToString(bytes),
			strings.Trim(fmt.Sprint(bytes), "[]"),
			strings.Trim(strings.ReplaceAll(fmt.Sprint(bytes), " ", ","), "[]"),
			strings.Trim(fmt.Sprintf("%#v", bytes), "[]byte{}"),
		} {
			if strings.Contains(text, leak) {
				t.Errorf("%q is in %s", leak, text)
			}
		}
	}
	if !strings.Contains(text, "redacted") {
		t.Error("nothing says that it is redacted")
	}
}

func BenchmarkHash(b *testing.B) {
	for name, a := range map[string][2]string{
		"v4": {"198.51.100.7", "192.0.2.1"}, "v6": {"2001:db8::7", "2001:db8:1::1"},
	} {
		b.Run(name, func(b *testing.B) {
			client, vip := netip.MustParseAddr(a[0]), netip.MustParseAddr(a[1])
			key := Secret{1}.FlowKey()
			for b.Loop() {
				key.Hash(client, vip, 49152, 443, 6)
			}
		})
	}
}
