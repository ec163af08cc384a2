// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"fairlead.dev/fairlead/internal/agent"
	"fairlead.dev/fairlead/internal/status"
)

func drainCommand() *cobra.Command {
	var socket string
	var undo, noWait bool
	var timeout time.Duration
	c := &cobra.Command{
		Use:   "drain BACKEND|NODE",
		Short: "Give a backend, or all of a node, no new flows, and wait until it has none",
		Long: `Give a backend (its address, with its port or without), or all backends of a node,
no new flows from this LB node, and wait until it has none left. Connections that
it has go on. Run it on each LB node of the shard; connections are kept while
some nodes drain and others do not. It holds until --undo, or until this node's
agent restarts: to drain for good, mark the endpoints as terminating.

A backend that no other could stand in for is not drained.`,
		Example: `  fairlead drain 10.244.1.2
  fairlead drain worker-1 --timeout 10m
  fairlead drain worker-1 --undo`,
		Args: args(cobra.ExactArgs(1)),
		RunE: func(c *cobra.Command, given []string) error {
			var answer struct{}
			if err := ask(socket, "POST", "/v1/drain", agent.DrainRequest{Name: given[0], Undo: undo}, &answer); err != nil {
				return err
			}
			if undo || noWait {
				return nil
			}
			return awaitDrained(c.OutOrStdout(), given[0], timeout, time.Second, func() (d status.Document, err error) {
				return d, ask(socket, "GET", "/v1/status", nil, &d)
			})
		},
	}
	c.Flags().StringVar(&socket, "socket", defaultSocket, socketHelp)
	c.Flags().BoolVar(&undo, "undo", false, "let it take new flows again")
	c.Flags().BoolVar(&noWait, "no-wait", false, "return at once")
	c.Flags().DurationVar(&timeout, "timeout", time.Hour, "give up waiting after this time; it goes on draining")
	return c
}

// awaitDrained tells how many flows are left until there are none.
func awaitDrained(w io.Writer, name string, timeout, pause time.Duration, read func() (status.Document, error)) error {
	last := ""
	for deadline := time.Now().Add(timeout); ; time.Sleep(pause) {
		d, err := read()
		if err != nil {
			return err
		}
		progress, done := drainProgress(d, name)
		if progress != last {
			fmt.Fprintln(w, progress)
			last = progress
		}
		if done {
			return nil
		}
		if time.Now().After(deadline) {
			return errors.New("not drained in time; it goes on draining, see fairlead status")
		}
	}
}

// drainProgress says how far the backends of a name are, as their nodes last
// said: a node that was not asked yet is not done.
func drainProgress(d status.Document, name string) (progress string, done bool) {
	backends, active, unknown, flows := 0, 0, 0, uint64(0)
	for _, s := range d.Services {
		for _, b := range s.Backends {
			if b.Node != name && b.Address != name && !strings.HasPrefix(b.Address, name+":") && !strings.HasPrefix(b.Address, "["+name+"]:") {
				continue
			}
			backends++
			switch {
			case b.State == "active":
				active++
			case b.Flows == nil:
				unknown++
			default:
				flows += uint64(*b.Flows)
			}
		}
	}
	progress = fmt.Sprintf("%s: %d backends, %d still take new flows, %d have not said what they have, %d flows left", name, backends, active, unknown, flows)
	return progress, active == 0 && unknown == 0 && flows == 0
}
