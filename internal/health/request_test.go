// SPDX-License-Identifier: Apache-2.0

package health

import (
	"bufio"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"

	"fairlead.dev/fairlead/internal/lb"
)

func addressOf(server *httptest.Server) netip.AddrPort {
	return server.Listener.Addr().(*net.TCPAddr).AddrPort()
}

// says answers each request with a text as it is.
func says(t *testing.T, text string) netip.AddrPort {
	return listen(t, func(conn net.Conn) {
		if _, err := http.ReadRequest(bufio.NewReader(conn)); err != nil {
			return
		}
		_, _ = io.WriteString(conn, text)
	})
}

func TestHTTP(t *testing.T) {
	const empty = "Content-Length: 0\r\n\r\n"
	for _, c := range []struct {
		name, answer string
		codes        []lb.CodeRange
		want         string
	}{
		{"ok", "HTTP/1.1 200 OK\r\n" + empty, nil, ""},
		{"without a body", "HTTP/1.1 204 No Content\r\n\r\n", nil, ""},
		{"a redirect is not followed", "HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\n" + empty, nil, ""},
		{"HTTP/1.0", "HTTP/1.0 200 OK\r\n\r\nyes", nil, ""},
		{"after early hints", "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 200 OK\r\n" + empty, nil, ""},
		{"endless hints", strings.Repeat("HTTP/1.1 103 Early Hints\r\n\r\n", 50), nil, "response: more than 4 interim ones"},
		{"wrong code", "HTTP/1.1 503 No\r\n" + empty, nil, "status 503, want 200-399"},
		{"expected code", "HTTP/1.1 418 Teapot\r\n" + empty, []lb.CodeRange{{From: 200, To: 299}, {From: 418, To: 418}}, ""},
		{"unexpected code", "HTTP/1.1 302 Found\r\n" + empty, []lb.CodeRange{{From: 200, To: 299}, {From: 418, To: 418}}, "status 302, want 200-299, 418"},
		{"long headers", "HTTP/1.1 200 OK\r\nA: " + strings.Repeat("a", 100<<10), nil, "response: headers of more than 64 KiB"},
		{"cut off", "HTTP/1.1 200 OK\r\nA:", nil, "response: the connection was closed"},
		{"nothing", "", nil, "response: the connection was closed"},
		{"nonsense", "220 mail\x1b[31m ready\r\n", nil, `response: malformed HTTP status code "mail\x1b[31m"`},
	} {
		t.Run(c.name, func(t *testing.T) {
			k := quick(lb.CheckHTTP)
			k.Codes = c.codes
			wantProblem(t, once(t, prober(t), says(t, c.answer), k), c.want)
		})
	}
}

func TestHTTPAsksAsItIsTold(t *testing.T) {
	asked := make(chan string, 100)
	server := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		asked <- fmt.Sprint(r.Method, " ", r.Host, " ", r.URL, " ", r.Close, " ", r.UserAgent())
	}))
	defer server.Close()
	c := quick(lb.CheckHTTP)
	c.Path, c.Host = "/ready?all=1", "shop.example:81"
	wantProblem(t, once(t, prober(t), addressOf(server), c), "")
	if got, want := <-asked, "GET shop.example:81 /ready?all=1 true fairlead-health"; got != want {
		t.Errorf("asked %q, want %q", got, want)
	}
	c.Path = "/a b\r\nX: y"
	wantProblem(t, once(t, prober(t), addressOf(server), c), `the path "/a b\r\nX: y" of the check is none`)
}

func TestAServerThatTakesItsTimeHoldsNothing(t *testing.T) {
	trickle := func(conn net.Conn, head, drop string) {
		_, err := io.WriteString(conn, head)
		for ; err == nil; _, err = io.WriteString(conn, drop) {
			time.Sleep(5 * time.Millisecond)
		}
	}
	hung := listen(t, untilClosed)
	slow := listen(t, func(conn net.Conn) { trickle(conn, "HTTP/1.1 200 OK\r\nA: ", "a") })
	endless := listen(t, func(conn net.Conn) { trickle(conn, "HTTP/1.1 200 OK\r\n\r\n", "body") })
	flood := listen(t, func(conn net.Conn) {
		for _, err := io.WriteString(conn, "HTTP/1.1 503 No\r\n\r\n"); err == nil; {
			_, err = conn.Write(make([]byte, 64<<10))
		}
	})
	for _, c := range []struct {
		name string
		kind lb.CheckKind
		at   netip.AddrPort
		want string
	}{
		{"hung, HTTP", lb.CheckHTTP, hung, "timeout after 100ms"},
		{"hung, HTTPS", lb.CheckHTTPS, hung, "timeout after 100ms"},
		{"hung, gRPC", lb.CheckGRPC, hung, "timeout after 100ms"},
		{"no SYN-ACK", lb.CheckHTTP, full(t), "timeout after 100ms"},
		{"slow headers", lb.CheckHTTP, slow, "timeout after 100ms"},
		{"endless body, slow", lb.CheckHTTP, endless, ""},
		{"endless body, fast", lb.CheckHTTP, flood, "status 503, want 200-399"},
		{"refused", lb.CheckHTTP, refused(t), "connect: connection refused"},
	} {
		t.Run(c.name, func(t *testing.T) {
			k := quick(c.kind)
			k.Timeout = 100 * time.Millisecond
			if c.want != "" && !strings.HasPrefix(c.want, "timeout") {
				k.Timeout = patience
			}
			v := once(t, prober(t), c.at, k)
			wantProblem(t, v, c.want)
			if v.RTT > 10*time.Second {
				t.Errorf("took %s", v.RTT)
			}
		})
	}
}

// certified serves HTTPS with a certificate for a name, signed by itself.
func certified(t *testing.T, name string) (netip.AddrPort, *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	must(t, err)
	leaf, err := x509.ParseCertificate(der)
	must(t, err)
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.TLS = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}
	server.StartTLS()
	t.Cleanup(server.Close)
	pool := x509.NewCertPool()
	pool.AddCert(leaf)
	return addressOf(server), pool
}

func TestHTTPS(t *testing.T) {
	at, pool := certified(t, "shop.example")
	for _, c := range []struct {
		name, host string
		roots      *x509.CertPool
		want       string
	}{
		{"any certificate", "", nil, ""},
		{"a certificate that is right", "shop.example", pool, ""},
		{"the port of the host is no part of the name", "shop.example:8443", pool, ""},
		{"nobody vouches for it", "shop.example", x509.NewCertPool(), "certificate shop.example: certificate signed by unknown authority"},
		{"another name", "bank.example", pool, "certificate shop.example: certificate is valid for shop.example, not bank.example"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := prober(t)
			p.roots = c.roots
			k := quick(lb.CheckHTTPS)
			k.Host = c.host
			wantProblem(t, once(t, p, at, k), c.want)
		})
	}
	t.Run("no TLS", func(t *testing.T) {
		plain := listen(t, func(conn net.Conn) { _, _ = io.WriteString(conn, "HTTP/1.1 400 Bad\r\n\r\n"); untilClosed(conn) })
		v := once(t, prober(t), plain, quick(lb.CheckHTTPS))
		wantProblem(t, v, "TLS handshake: tls: first record does not look like a TLS handshake")
	})
}

func TestMoreRequestsThanWorkersWait(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	defer server.Close()
	p := start(t, prober(t))
	c := quick(lb.CheckHTTP)
	c.Interval = time.Second
	probes := probesOf(3*workers, c)
	for i := range probes {
		probes[i].Address = addressOf(server)
	}
	p.Set(probes)
	for _, probe := range probes {
		if v := await(t, p, probe.ID, "known", known); !v.Healthy {
			t.Fatalf("%s: %+v", probe.ID, v)
		}
	}
}

func TestAProblemIsOneShortLine(t *testing.T) {
	got := line("a\nb\x1b[31m\xff" + strings.Repeat("é", 1000))
	if strings.ContainsAny(got, "\n\x1b") || len(got) > maxProblem+3 || !strings.HasPrefix(got, "a?b?[31m") {
		t.Errorf("%q", got)
	}
}
