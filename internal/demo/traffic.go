// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"

	"fairlead.dev/fairlead/internal/testnet"
)

const patience = 3 * time.Second

// tallies are what the clients saw.
type tallies struct {
	mu       sync.Mutex
	answered int
	kept     int            // of those, the server saw the client's own address
	pods     map[string]int // who answered
	last     error
}

func newTallies() *tallies { return &tallies{pods: map[string]int{}} }

func (t *tallies) note(err error) {
	if err != nil {
		t.mu.Lock()
		t.last = err
		t.mu.Unlock()
	}
}

// answer takes what a server says: its name, and whom it saw.
func (t *tallies) answer(text string, vip netip.Addr) error {
	name, seen, ok := strings.Cut(strings.TrimSpace(text), " ")
	if !ok {
		return fmt.Errorf("strange answer %q", text)
	}
	client := testnet.Client4
	if vip.Is6() {
		client = testnet.Client6
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.answered++
	t.pods[name]++
	if seen == client.String() {
		t.kept++
	}
	return nil
}

// serve starts an HTTP and a UDP server in every Pod. Each says its name and
// the address that it saw.
func (d *Demo) serve() (stop func(), err error) {
	var closers []io.Closer
	stop = func() {
		for _, c := range closers {
			c.Close()
		}
	}
	for _, pod := range d.net.AllPods() {
		var tcp net.Listener
		var udp net.PacketConn
		err := pod.Do(func() (err error) {
			if tcp, err = net.Listen("tcp", ":8080"); err != nil {
				return err
			}
			udp, err = net.ListenPacket("udp", ":5353")
			return err
		})
		if err != nil {
			stop()
			return nil, fmt.Errorf("serve in %s: %w", pod.Label, err)
		}
		closers = append(closers, tcp, udp)
		go serveHTTP(tcp, pod.Label)
		go serveUDP(udp, pod.Label)
	}
	return stop, nil
}

func serveHTTP(l net.Listener, name string) {
	server := &http.Server{ReadHeaderTimeout: patience, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "%s %s\n", name, seenAddress(r.RemoteAddr))
	})}
	_ = server.Serve(l) // ends when the listener is closed
}

func serveUDP(c net.PacketConn, name string) {
	buffer := make([]byte, 2048)
	for {
		_, from, err := c.ReadFrom(buffer)
		if err != nil {
			return
		}
		_, _ = c.WriteTo(fmt.Appendf(nil, "%s %s", name, seenAddress(from.String())), from)
	}
}

func seenAddress(remote string) string {
	addr, err := netip.ParseAddrPort(remote)
	if err != nil {
		return remote
	}
	return addr.Addr().Unmap().String()
}

// request makes one HTTP request over a connection of its own.
func (d *Demo) request(vip netip.Addr) error {
	client := http.Client{Timeout: patience, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, address string) (c net.Conn, err error) {
			err = errors.Join(err, d.net.Client.Do(func() error {
				c, err = (&net.Dialer{Timeout: patience}).DialContext(ctx, network, address)
				return err
			}))
			return c, err
		}}}
	response, err := client.Get("http://" + netip.AddrPortFrom(vip, 80).String() + "/")
	if err != nil {
		return err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		return err
	}
	return d.tallies.answer(string(text), vip)
}

// exchange sends one datagram and waits for the answer.
func (d *Demo) exchange(vip netip.Addr) error {
	var c net.Conn
	err := d.net.Client.Do(func() (err error) {
		c, err = net.Dial("udp", netip.AddrPortFrom(vip, 53).String())
		return err
	})
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	if _, err := c.Write([]byte("who?")); err != nil {
		return err
	}
	buffer := make([]byte, 2048)
	n, err := c.Read(buffer)
	if err != nil {
		return err
	}
	return d.tallies.answer(string(buffer[:n]), vip)
}
