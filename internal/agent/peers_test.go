// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"fairlead.dev/fairlead/internal/peer"
)

// syncText is a log that a test reads while others write.
type syncText struct {
	mu   sync.Mutex
	text strings.Builder
}

func (s *syncText) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.Write(b)
}

func (s *syncText) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.String()
}

// A port that is taken ends nothing, and is taken over when it is free.
func TestPeersPortTaken(t *testing.T) {
	authority, ca, _, err := peer.NewAuthority(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	certificate, key, err := authority.Issue("lb-1", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for name, text := range map[string][]byte{"ca": ca, "crt": certificate, "key": key} {
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	identity, err := peer.LoadIdentity(filepath.Join(dir, "crt"), filepath.Join(dir, "key"), filepath.Join(dir, "ca"))
	if err != nil {
		t.Fatal(err)
	}
	taken, err := net.Listen("tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	log := &syncText{}
	a := New(Config{}, "test", slog.New(slog.NewTextHandler(log, nil)))
	a.config.Peers.Port = uint16(taken.Addr().(*net.TCPAddr).Port)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- a.peerServer(identity).Run(ctx) }()
	wait := func(what string, f func() bool) {
		t.Helper()
		for deadline := time.Now().Add(10 * time.Second); !f(); time.Sleep(20 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("%s: %s", what, log)
			}
		}
	}
	wait("no word of the port", func() bool { return strings.Contains(log.String(), "peers.port") })
	address := taken.Addr().String()
	taken.Close()
	wait("nobody listens", func() bool {
		c, err := net.Dial("tcp", address)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	cancel()
	if err := <-done; err != nil && ctx.Err() == nil {
		t.Error(err)
	}
}
