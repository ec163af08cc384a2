// SPDX-License-Identifier: Apache-2.0

package route

import (
	"context"
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
)

// receiveBuffer holds a burst of some ten thousand events. What overflows it
// ends Watch with an error; the caller starts it again and resolves anew.
const receiveBuffer = 4 << 20

// Watch calls changed once when it is ready, and then for each event about a
// route, a neighbour or a link, until ctx ends (then it returns nil) or events
// were lost.
func (t *Table) Watch(ctx context.Context, changed func()) error {
	done := make(chan struct{})
	defer close(done)
	broken := make(chan error, 3)
	note := func(err error) {
		select {
		case broken <- err:
		default:
		}
	}
	routes := make(chan netlink.RouteUpdate, 64)
	if err := netlink.RouteSubscribeWithOptions(routes, done, netlink.RouteSubscribeOptions{
		ErrorCallback: note, ReceiveBufferSize: receiveBuffer}); err != nil {
		return fmt.Errorf("subscribe to routes: %w", err)
	}
	neighbours := make(chan netlink.NeighUpdate, 64)
	if err := netlink.NeighSubscribeWithOptions(neighbours, done, netlink.NeighSubscribeOptions{
		ErrorCallback: note, ReceiveBufferSize: receiveBuffer}); err != nil {
		return fmt.Errorf("subscribe to neighbours: %w", err)
	}
	links := make(chan netlink.LinkUpdate, 64)
	if err := netlink.LinkSubscribeWithOptions(links, done, netlink.LinkSubscribeOptions{
		ErrorCallback: note, ReceiveBufferSize: receiveBuffer}); err != nil {
		return fmt.Errorf("subscribe to links: %w", err)
	}
	t.forget()
	changed()
	return t.follow(ctx, routes, neighbours, links, broken, changed)
}

func (t *Table) follow(ctx context.Context, routes <-chan netlink.RouteUpdate, neighbours <-chan netlink.NeighUpdate,
	links <-chan netlink.LinkUpdate, broken <-chan error, changed func()) error {
	for {
		open := true
		select {
		case <-ctx.Done():
			return nil
		case err := <-broken:
			return fmt.Errorf("receive netlink events: %w", err)
		case _, open = <-routes:
		case _, open = <-neighbours:
		case _, open = <-links:
		}
		if !open {
			select {
			case err := <-broken:
				return fmt.Errorf("receive netlink events: %w", err)
			default:
				return errors.New("receive netlink events: the socket was closed")
			}
		}
		t.forget()
		changed()
	}
}

// forget makes the next Resolve dump the neighbours again.
func (t *Table) forget() {
	t.mu.Lock()
	t.neighbours = nil
	t.mu.Unlock()
}
