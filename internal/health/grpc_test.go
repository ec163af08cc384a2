// SPDX-License-Identifier: Apache-2.0

package health

import (
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"

	"fairlead.dev/fairlead/internal/lb"
)

// grpcServer answers over HTTP/2 without TLS, as gRPC servers do.
func grpcServer(t *testing.T, handle http.HandlerFunc) netip.AddrPort {
	t.Helper()
	server := httptest.NewUnstartedServer(handle)
	server.Config.Protocols = new(http.Protocols)
	server.Config.Protocols.SetUnencryptedHTTP2(true)
	server.Start()
	t.Cleanup(server.Close)
	return addressOf(server)
}

// answer sends a message and then, in the trailers, a status.
func answer(message, status string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/grpc")
		w.Header().Set("Trailer", "Grpc-Status")
		_, _ = w.Write(frameOf([]byte(message)))
		w.Header().Set("Grpc-Status", status)
	}
}

func TestGRPC(t *testing.T) {
	for _, c := range []struct {
		name   string
		handle http.HandlerFunc
		want   string
	}{
		{"serving", answer("\x08\x01", "0"), ""},
		{"not serving", answer("\x08\x02", "0"), "NOT_SERVING, want SERVING"},
		{"unknown is 0, which is not sent", answer("", "0"), "UNKNOWN, want SERVING"},
		{"from the future", answer("\x08\x63", "0"), "serving status 99, want SERVING"},
		{"nonsense", answer("\x08", "0"), "response: no HealthCheckResponse"},
		{"a status after all", answer("\x08\x01", "13"), "gRPC status 13: "},
		{"no status", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(frameOf([]byte("\x08\x01"))) }, "response: no gRPC status"},
		{"no such service, without a body", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Grpc-Status", "5")
			w.Header().Set("Grpc-Message", "unknown service")
		}, "gRPC status 5: unknown service"},
		{"not gRPC", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNotFound) }, "status 404, want 200"},
		{"too long", answer(strings.Repeat("a", 1<<20), "0"), "response: more than 4 KiB"},
	} {
		t.Run(c.name, func(t *testing.T) {
			wantProblem(t, once(t, prober(t), grpcServer(t, c.handle), quick(lb.CheckGRPC)), c.want)
		})
	}
}

func TestGRPCAsksAsItIsTold(t *testing.T) {
	asked := make(chan string, 100)
	at := grpcServer(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		asked <- strings.Join([]string{r.Proto, r.Method, r.Host, r.URL.Path, r.Header.Get("Content-Type"), r.Header.Get("Te"), string(body)}, " ")
		answer("\x08\x01", "0")(w, r)
	})
	c := quick(lb.CheckGRPC)
	c.GRPCService, c.Host = "shop.Cart", "shop.example"
	wantProblem(t, once(t, prober(t), at, c), "")
	want := "HTTP/2.0 POST shop.example /grpc.health.v1.Health/Check application/grpc trailers \x00\x00\x00\x00\x0b\x0a\x09shop.Cart"
	if got := <-asked; got != want {
		t.Errorf("asked %q, want %q", got, want)
	}
}

func TestGRPCOfAServerWithoutHTTP2(t *testing.T) {
	v := once(t, prober(t), says(t, "HTTP/1.1 400 Bad Request\r\n\r\n"), quick(lb.CheckGRPC))
	if v.Healthy || v.Problem == "" || strings.Contains(v.Problem, "timeout") {
		t.Errorf("got %+v", v)
	}
}

func FuzzReadStatus(f *testing.F) {
	for _, message := range []string{"", "\x08\x01", "\x08\x02\x12\x01a\x19\x00\x00\x00\x00\x00\x00\x00\x00\x25\x00\x00\x00\x00", "\x12\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "\x0b"} {
		f.Add(frameOf([]byte(message)))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		status, err := readStatus(b)
		if err != nil && status != 0 {
			t.Errorf("%q: %d, %v", b, status, err)
		}
	})
}
