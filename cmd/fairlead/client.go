// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"strings"
	"syscall"
	"time"

	"fairlead.dev/fairlead/internal/agent"
)

// ask sends a request to the agent's status API and decodes the answer.
func ask(socket, method, path string, request, answer any) error {
	client := http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		}}}
	var body bytes.Buffer
	if request != nil {
		if err := json.NewEncoder(&body).Encode(request); err != nil {
			return fmt.Errorf("encode the request: %w", err)
		}
	}
	r, err := http.NewRequest(method, "http://agent"+path, &body)
	if err != nil {
		return fmt.Errorf("make the request: %w", err)
	}
	response, err := client.Do(r)
	switch {
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("the agent's socket %s is for root alone; run: sudo %s", socket, commandLine())
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("no agent answers on %s; start one with fairlead agent --config FILE, or name its socket with --socket", socket)
	case err != nil:
		return fmt.Errorf("ask the agent: %w", err)
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(response.Body, 4096))
		return fmt.Errorf("the agent says: %s", strings.TrimSpace(string(text)))
	}
	return json.NewDecoder(response.Body).Decode(answer)
}

const socketHelp = "the agent's status socket"

var defaultSocket = agent.DefaultSocket
