// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"fmt"

	"fairlead.dev/fairlead/internal/testnet"
)

// others are ways of balancing that do not ask, computed from what the same
// connections meet: which LB node the router sends them to, and whom the hash
// names there.
type others struct {
	demo  *Demo
	all   []*conversation
	hash  map[*conversation]bool // broken by a pure hash
	table map[*conversation]bool // broken with a table of flows on each LB node

	remembered map[*testnet.Node]map[*conversation]bool
	names      map[string]string // of Pods, by address
}

func newOthers(d *Demo, all []*conversation) *others {
	o := &others{demo: d, all: all, hash: map[*conversation]bool{}, table: map[*conversation]bool{},
		remembered: map[*testnet.Node]map[*conversation]bool{}, names: map[string]string{}}
	for _, node := range d.net.LoadBalancers() {
		o.remembered[node] = map[*conversation]bool{}
	}
	for _, pod := range d.net.AllPods() {
		o.names[pod.Address4.String()], o.names[pod.Address6.String()] = pod.Label, pod.Label
	}
	// The connections have just begun: each is remembered where it passed.
	for _, c := range all {
		if node, err := d.net.Way(c.client, c.vip); err == nil {
			o.remembered[node][c] = true
		}
	}
	return o
}

// look looks where each connection's packets go now. A node that is not on any
// way any more has lost its table.
func (o *others) look() error {
	used := map[*testnet.Node]bool{}
	for _, c := range o.all {
		node, err := o.demo.net.Way(c.client, c.vip)
		if err != nil {
			return err
		}
		used[node] = true
		target, err := node.Hashed(c.client, c.vip)
		if err != nil {
			return fmt.Errorf("whom the hash names at %s: %w", node.Name(), err)
		}
		owner := o.names[target.String()] == c.pod
		if !owner {
			o.hash[c] = true
		}
		switch {
		case o.remembered[node][c]:
		case owner:
			o.remembered[node][c] = true
		default:
			o.table[c] = true
		}
	}
	for node := range o.remembered {
		if !used[node] {
			clear(o.remembered[node])
		}
	}
	return nil
}
