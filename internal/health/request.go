// SPDX-License-Identifier: Apache-2.0

package health

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"syscall"
	"time"

	"fairlead.dev/fairlead/internal/lb"
)

const (
	maxHeaders  = 64 << 10
	maxInterim  = 5 // responses 1xx before the real one
	bodyRead    = 4 << 10
	bodyTime    = 100 * time.Millisecond
	userAgent   = "fairlead-health"
	defaultFrom = 200
	defaultTo   = 399
)

// ask does a probe that needs a request. It never takes longer than the
// check's timeout; fault is why there was no probe.
func (p *Prober) ask(ctx context.Context, probe lb.Probe) (text string, err error) {
	limit := timeout(probe.Check)
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	conn, err := p.dial(ctx, probe)
	if err != nil {
		if isFault(err) {
			return "", err
		}
		return problem("connect", err, limit), nil
	}
	defer conn.Close()
	// Whatever blocks on the connection ends with the context.
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	switch probe.Check.Kind {
	case lb.CheckHTTP:
		return get(conn, "http", probe, limit), nil
	case lb.CheckHTTPS:
		secure, err := p.secure(ctx, conn, probe.Check)
		if err != nil {
			return problem("TLS handshake", err, limit), nil
		}
		defer secure.Close() // says goodbye
		return get(secure, "https", probe, limit), nil
	case lb.CheckGRPC:
		return checkGRPC(ctx, conn, probe, limit), nil
	}
	return "", fault{fmt.Errorf("no check of kind %q is known", probe.Check.Kind)}
}

// dial connects to what is probed.
func (p *Prober) dial(ctx context.Context, probe lb.Probe) (net.Conn, error) {
	if !probe.Address.IsValid() {
		return nil, fault{errors.New("the probe has no address")}
	}
	dialer := net.Dialer{KeepAlive: -1}
	if probe.Tunneled && p.bind != nil {
		dialer.Control = func(_, _ string, socket syscall.RawConn) (err error) {
			if outer := socket.Control(func(fd uintptr) { err = p.bind(probe, int(fd)) }); outer != nil {
				err = outer
			}
			if err != nil {
				return fault{fmt.Errorf("bind the socket to its backend: %w", err)}
			}
			return nil
		}
	}
	conn, err := dialer.DialContext(ctx, "tcp", probe.Address.String())
	if err != nil {
		return nil, err
	}
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0) // end with a RST, as TCP probes do
	}
	return conn, nil
}

// secure does a TLS handshake. Without a name to be checked, any certificate
// is as good.
func (p *Prober) secure(ctx context.Context, conn net.Conn, c lb.Check) (*tls.Conn, error) {
	config := &tls.Config{RootCAs: p.roots, ServerName: hostname(c.Host), InsecureSkipVerify: c.Host == "", NextProtos: []string{"http/1.1"}}
	secure := tls.Client(conn, config)
	if err := secure.HandshakeContext(ctx); err != nil {
		return nil, err
	}
	return secure, nil
}

// hostname returns a Host header's value without its port.
func hostname(host string) string {
	if name, _, err := net.SplitHostPort(host); err == nil {
		return name
	}
	return strings.Trim(host, "[]")
}

// get asks with HTTP/1.1 and looks at the code. It is written on the
// connection itself: a Transport would only add goroutines and follow-ups.
func get(conn net.Conn, scheme string, probe lb.Probe, limit time.Duration) string {
	request, err := newRequest(scheme, probe)
	if err != nil {
		return line(err.Error())
	}
	if err := request.Write(conn); err != nil {
		return problem("request", err, limit)
	}
	bounded := &io.LimitedReader{R: conn, N: maxHeaders}
	reader := bufio.NewReader(bounded)
	for range maxInterim {
		response, err := http.ReadResponse(reader, request)
		switch {
		case err != nil && bounded.N <= 0:
			return fmt.Sprintf("response: headers of more than %d KiB", maxHeaders>>10)
		case err != nil:
			return problem("response", err, limit)
		case response.StatusCode >= 200 || response.StatusCode == http.StatusSwitchingProtocols:
			text := judgeCode(response.StatusCode, probe.Check.Codes)
			drain(conn, response.Body)
			return text
		}
	}
	return fmt.Sprintf("response: more than %d interim ones", maxInterim-1)
}

func newRequest(scheme string, probe lb.Probe) (*http.Request, error) {
	path := probe.Check.Path
	if path == "" {
		path = "/"
	}
	target, err := url.ParseRequestURI(path)
	if err != nil || path[0] != '/' {
		return nil, fmt.Errorf("the path %q of the check is none", path)
	}
	target.Scheme, target.Host = scheme, probe.Address.String()
	return &http.Request{Method: http.MethodGet, URL: target, Host: probe.Check.Host, Close: true,
		Header: http.Header{"User-Agent": {userAgent}, "Accept": {"*/*"}}}, nil
}

// drain reads a little of a body, that the server may end in peace. The
// verdict is known, so it does not matter what comes of it.
func drain(conn net.Conn, body io.Reader) {
	_ = conn.SetReadDeadline(time.Now().Add(bodyTime))
	_, _ = io.CopyN(io.Discard, body, bodyRead)
}

// judgeCode says what is wrong with a status code; "": nothing.
func judgeCode(code int, want []lb.CodeRange) string {
	if len(want) == 0 {
		want = []lb.CodeRange{{From: defaultFrom, To: defaultTo}}
	}
	if slices.ContainsFunc(want, func(r lb.CodeRange) bool { return r.From <= code && code <= r.To }) {
		return ""
	}
	ranges := make([]string, len(want))
	for i, r := range want {
		ranges[i] = fmt.Sprintf("%d-%d", r.From, r.To)
		if r.From == r.To {
			ranges[i] = fmt.Sprint(r.From)
		}
	}
	return line(fmt.Sprintf("status %d, want %s", code, strings.Join(ranges, ", ")))
}
