// SPDX-License-Identifier: Apache-2.0

package peer

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"time"

	"crypto/tls"
)

const (
	censusPath  = "/v1/census"
	recordsPath = "/v1/records"
	verdictPath = "/v1/verdicts"
)

// Node is what is asked of this one, and told to it.
type Node interface {
	// MayAsk says whether a node may do either.
	MayAsk(node string) bool
	// Census answers questions about this node's flows, in their order.
	Census(questions []Question) ([][]Answer, error)
	// Record takes in what another LB node recorded.
	Record(records []Record) error
	// Judge takes in what another LB node's probes say.
	Judge(verdicts []Verdict) error
}

// Serve answers on a listener until ctx ends.
func Serve(ctx context.Context, listener net.Listener, identity *Identity, node Node) error {
	mux := http.NewServeMux()
	mux.Handle("POST "+censusPath, census(node))
	mux.Handle("POST "+recordsPath, told(node.Record))
	mux.Handle("POST "+verdictPath, told(node.Judge))
	server := &http.Server{Handler: mux, ReadTimeout: 10 * time.Second, WriteTimeout: 30 * time.Second, MaxHeaderBytes: 16 << 10}
	stop := context.AfterFunc(ctx, func() { server.Close() })
	defer stop()
	err := server.Serve(tls.NewListener(listener, identity.server(node.MayAsk)))
	if ctx.Err() != nil || errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return fmt.Errorf("answer peers on %s: %w", listener.Addr(), err)
}

// told takes in what an LB node tells.
func told[T any](take func([]T) error) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var all []T
		err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody)).Decode(&all)
		if err == nil && len(all) > MaxRecords {
			err = fmt.Errorf("%d records in one request, %d are the most", len(all), MaxRecords)
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		if err := take(all); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
		}
	})
}

// census answers questions. Who has the same answer already is told so.
func census(node Node) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var questions []Question
		decoder := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody))
		decoder.DisallowUnknownFields()
		err := decoder.Decode(&questions)
		if err == nil {
			err = check(questions)
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		answers, err := node.Census(questions)
		if err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		body := encode(answers)
		sum := sha256.Sum256(body)
		tag := `"` + hex.EncodeToString(sum[:16]) + `"`
		w.Header().Set("ETag", tag)
		if r.Header.Get("If-None-Match") == tag {
			w.WriteHeader(http.StatusNotModified)
			return
		}
		_, _ = w.Write(body)
	})
}

// Client asks other nodes' agents. It is safe for concurrent use.
type Client struct {
	identity *Identity
	mu       sync.Mutex
	nodes    map[string]*node
}

// node is what is kept of one that was asked: the connection and, for the next
// time, the answer.
type node struct {
	mu     sync.Mutex
	http   *http.Client
	asked  string // the questions
	tag    string
	answer []byte
}

// NewClient returns a Client that asks as this node.
func NewClient(identity *Identity) *Client {
	return &Client{identity: identity, nodes: map[string]*node{}}
}

func (c *Client) node(name string) *node {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := c.nodes[name]
	if n == nil {
		transport := &http.Transport{TLSClientConfig: c.identity.client(name), MaxIdleConns: 1, IdleConnTimeout: time.Minute,
			TLSHandshakeTimeout: 2 * time.Second, DialContext: (&net.Dialer{Timeout: time.Second}).DialContext}
		n = &node{http: &http.Client{Transport: transport}}
		c.nodes[name] = n
	}
	return n
}

// Keep forgets all nodes but those that are still there.
func (c *Client) Keep(there map[string]bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for name, n := range c.nodes {
		if !there[name] {
			n.http.CloseIdleConnections()
			delete(c.nodes, name)
		}
	}
}

// Ask asks the agent of a node, which is at an address; the answers are in the
// order of the questions and their targets.
func (c *Client) Ask(ctx context.Context, name string, at netip.AddrPort, questions []Question) ([][]Answer, error) {
	n := c.node(name)
	n.mu.Lock()
	defer n.mu.Unlock()
	answers, err := n.ask(ctx, at, questions)
	if err != nil {
		return nil, fmt.Errorf("ask the agent of node %s at %s: %w", name, at, err)
	}
	return answers, nil
}

func (n *node) ask(ctx context.Context, at netip.AddrPort, questions []Question) ([][]Answer, error) {
	body, err := json.Marshal(questions)
	if err != nil {
		return nil, err
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://"+at.String()+censusPath, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	if string(body) == n.asked {
		request.Header.Set("If-None-Match", n.tag)
	}
	response, err := n.http.Do(request)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(io.LimitReader(response.Body, maxAnswer))
	switch {
	case err != nil:
		return nil, err
	case response.StatusCode == http.StatusNotModified && string(body) == n.asked:
		return decode(n.answer, questions)
	case response.StatusCode != http.StatusOK:
		return nil, fmt.Errorf("%s: %s", response.Status, bytes.TrimSpace(text[:min(len(text), 200)]))
	}
	answers, err := decode(text, questions)
	if err == nil {
		n.asked, n.tag, n.answer = string(body), response.Header.Get("ETag"), text
	}
	return answers, err
}

// Tell tells the agent of an LB node, which is at an address, what this one
// recorded.
func (c *Client) Tell(ctx context.Context, name string, at netip.AddrPort, records []Record) error {
	return tell(ctx, c, name, at, recordsPath, records)
}

// TellVerdicts tells it what this node's probes say.
func (c *Client) TellVerdicts(ctx context.Context, name string, at netip.AddrPort, verdicts []Verdict) error {
	return tell(ctx, c, name, at, verdictPath, verdicts)
}

func tell[T any](ctx context.Context, c *Client, name string, at netip.AddrPort, path string, all []T) error {
	for batch := range slices.Chunk(all, MaxRecords) {
		body, err := json.Marshal(batch)
		if err != nil {
			return fmt.Errorf("tell node %s: %w", name, err)
		}
		request, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://"+at.String()+path, bytes.NewReader(body))
		if err != nil {
			return fmt.Errorf("tell node %s: %w", name, err)
		}
		response, err := c.node(name).http.Do(request)
		if err != nil {
			return fmt.Errorf("tell node %s at %s: %w", name, at, err)
		}
		text, _ := io.ReadAll(io.LimitReader(response.Body, 200))
		response.Body.Close()
		if response.StatusCode != http.StatusOK {
			return fmt.Errorf("tell node %s at %s: %s: %s", name, at, response.Status, bytes.TrimSpace(text))
		}
	}
	return nil
}
