// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/vishvananda/netlink"

	"fairlead.dev/fairlead/internal/dataplane"
	"fairlead.dev/fairlead/internal/plan"
	"fairlead.dev/fairlead/internal/run"
	"fairlead.dev/fairlead/internal/status"
)

// largestRequest bounds what a client of the status API may send, in bytes.
const largestRequest = 256 << 10

// TraceRequest asks what would become of a frame.
type TraceRequest struct {
	Frame     []byte `json:"frame"`
	Interface string `json:"interface"` // "" for the first of the agent's
}

// servers listen, and return the tasks that serve.
func (a *Agent) servers() ([]run.Task, error) {
	local, err := listenLocal(a.config.Socket)
	if err != nil {
		return nil, err
	}
	tasks := []run.Task{serve("status API", local, a.localAPI())}
	if a.config.Metrics == "" {
		return tasks, nil
	}
	public, err := net.Listen("tcp", a.config.Metrics)
	if err != nil {
		local.Close()
		return nil, fmt.Errorf("metrics: %w; choose another address, or none", err)
	}
	return append(tasks, serve("metrics", public, a.publicAPI())), nil
}

// listenLocal listens on a socket for root alone. One that is left over is
// replaced, one that somebody answers on is not.
func listenLocal(path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("socket: %w", err)
	}
	if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
		c.Close()
		return nil, fmt.Errorf("socket: another agent answers on %s; stop it, or give this one another socket and pinDir", path)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("socket: remove the one left over: %w", err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("socket: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		l.Close()
		return nil, fmt.Errorf("socket: %w", err)
	}
	return l, nil
}

func serve(name string, l net.Listener, handler http.Handler) run.Task {
	server := &http.Server{Handler: handler, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 30 * time.Second}
	return run.Task{Name: name, Run: func(ctx context.Context) error {
		stop := context.AfterFunc(ctx, func() { server.Close() })
		defer stop()
		if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			return err
		}
		return nil
	}}
}

func (a *Agent) localAPI() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, _ *http.Request) { writeJSON(w, a.Status()) })
	mux.HandleFunc("GET /v1/plan", func(w http.ResponseWriter, _ *http.Request) {
		a.mu.Lock()
		defer a.mu.Unlock()
		_, _ = w.Write([]byte(plan.Format(a.plan)))
	})
	mux.HandleFunc("POST /v1/trace", a.trace)
	mux.HandleFunc("POST /v1/simulate", a.simulate)
	mux.HandleFunc("POST /v1/drain", a.drain)
	return mux
}

func writeJSON(w http.ResponseWriter, value any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(value) // the client has gone
}

func (a *Agent) trace(w http.ResponseWriter, r *http.Request) {
	var request TraceRequest
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, largestRequest)).Decode(&request); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	if request.Interface == "" {
		request.Interface = a.config.Interfaces[0]
	}
	device, err := netlink.LinkByName(request.Interface)
	if err != nil {
		http.Error(w, request.Interface+": "+err.Error(), http.StatusBadRequest)
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.dataplane == nil {
		http.Error(w, dataplane.ErrNotLoaded.Error(), http.StatusServiceUnavailable)
		return
	}
	trace, err := a.dataplane.Trace(request.Frame, device.Attrs().Index)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	writeJSON(w, trace)
}

func (a *Agent) publicAPI() http.Handler {
	registry := prometheus.NewRegistry()
	registry.MustRegister(status.Collector{Read: a.Status}, collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if err := a.ready(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	return mux
}

// ready reads the maps back.
func (a *Agent) ready() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.problem != nil {
		return a.problem
	}
	want, err := a.desired()
	if err != nil {
		return err
	}
	return a.dataplane.Verify(want)
}
