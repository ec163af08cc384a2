// SPDX-License-Identifier: Apache-2.0

package flowhash

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
)

// Secret is what the LB nodes of a shard share. It prints as "redacted"; Hex
// is the one way to its digits.
type Secret [32]byte

// NewSecret reads a secret from a source of random bytes.
func NewSecret(random io.Reader) (Secret, error) {
	var s Secret
	if _, err := io.ReadFull(random, s[:]); err != nil {
		return Secret{}, fmt.Errorf("read random bytes: %w", err)
	}
	return s, nil
}

// ParseSecret parses 64 hex digits, white space around them ignored. Its
// errors never quote what was read.
func ParseSecret(text string) (Secret, error) {
	var s Secret
	if err := parseHex(s[:], text); err != nil {
		return Secret{}, fmt.Errorf("parse secret: %w", err)
	}
	if s == (Secret{}) {
		return Secret{}, errors.New("parse secret: all digits are zero")
	}
	return s, nil
}

// Hex returns the 64 hex digits that ParseSecret takes.
func (s Secret) Hex() string { return hex.EncodeToString(s[:]) }

// FlowKey returns the key of the flow hash.
func (s Secret) FlowKey() Key { return Key(s.derive("fairlead flow hash")[:16]) }

// Tag returns the tag that tunnel packets to a node carry.
func (s Secret) Tag(node string) [8]byte { return [8]byte(s.derive("fairlead tag " + node)[:8]) }

func (s Secret) derive(label string) []byte {
	h := hmac.New(sha256.New, s[:])
	h.Write([]byte(label))
	return h.Sum(nil)
}

const redacted = "redacted"

// String returns "redacted".
func (Secret) String() string { return redacted }

// GoString returns "redacted".
func (Secret) GoString() string { return redacted }

// Format writes "redacted" for every verb: without it, %x and %d would print
// the bytes.
func (Secret) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }

// LogValue returns "redacted".
func (Secret) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalText returns "redacted", which no parser takes back: a secret is
// written by Hex alone.
func (Secret) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// String returns "redacted".
func (Key) String() string { return redacted }

// GoString returns "redacted".
func (Key) GoString() string { return redacted }

// Format writes "redacted" for every verb.
func (Key) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }

// LogValue returns "redacted".
func (Key) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalText returns "redacted".
func (Key) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// ParseTag parses a worker's tag: 16 hex digits, white space around them
// ignored. Its errors never quote what was read.
func ParseTag(text string) ([8]byte, error) {
	var tag [8]byte
	if err := parseHex(tag[:], text); err != nil {
		return [8]byte{}, fmt.Errorf("parse tag: %w", err)
	}
	return tag, nil
}

func parseHex(to []byte, text string) error {
	text = strings.TrimSpace(text)
	if len(text) != 2*len(to) {
		return fmt.Errorf("%d characters where %d hex digits are expected", len(text), 2*len(to))
	}
	if _, err := hex.Decode(to, []byte(text)); err != nil {
		// The error of package hex quotes the digit that it stumbled over.
		return errors.New("not all are hex digits")
	}
	return nil
}
