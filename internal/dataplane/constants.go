// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"fairlead.dev/fairlead/internal/lb"
)

// What a tunnel adds to an L3 packet at most, for the MSS clamp: IPv6, UDP,
// Geneve with our option and an address of the packet's family.
const (
	outerBytes = 40 + 8 + 8 + 4 + 32
	tcpBytes   = 20
	leastMTU   = 1280 // of IPv6, below which clamping helps nobody
	// budgetFloor is how many questions beyond the first attempt each client
	// prefix may cause in a second, for each service and CPU.
	budgetFloor  = 4096
	defaultTCP   = 2*time.Hour + 10*time.Minute
	defaultUDP   = 2 * time.Minute
	defaultClose = 2 * time.Minute
)

// constants are what the programs are loaded with. Changing one means loading
// them again, and swapping.
func (d *Dataplane) constants(want Desired) (bpfConfig, error) {
	cfg, plan := d.config, want.Plan
	c := bpfConfig{Vni: cfg.VNI, GenevePort: swap16(cfg.GenevePort), Tag: cfg.Tag, BudgetFloor: budgetFloor,
		IdleTcpNs:     uint64(cfg.Timeouts.TCP),
		IdleUdpNs:     uint64(cfg.Timeouts.UDP),
		IdleClosingNs: uint64(cfg.Timeouts.Closing)}
	if !plan.LoadBalancer && !plan.Backend {
		return c, fmt.Errorf("refuse Node %s: spec.roles: empty; give it LoadBalancer, Backend or both", plan.Node)
	}
	if plan.LoadBalancer {
		if cfg.Secret == nil {
			return c, errors.New("secretFile: missing, and this node has role LoadBalancer; make one with `fairlead keys`, the same for all LB nodes of the shard")
		}
		c.Lb = 1
		c.Key = cfg.Secret.FlowKey().Words()
	}
	if plan.Backend {
		c.Backend = 1
	}
	for _, pod := range plan.Pods {
		if pod.CookiesFrom > 0 {
			c.Cookies = 1
		}
	}
	for _, addr := range plan.TunnelAddresses {
		if addr.Is4() {
			c.Node4, c.Ipip4 = bpfAddrOf(addr), bpfAddrOf(addr)
		} else {
			c.Node6, c.Ipip6 = bpfAddrOf(addr), bpfAddrOf(addr)
		}
	}
	if err := d.natConstants(&c, plan); err != nil {
		return c, err
	}
	for _, prefix := range plan.IPIPSources {
		if prefix.Addr().Is4() {
			c.Ipip4, c.Ipip4Mask = bpfAddrOf(prefix.Masked().Addr()), hostMask(prefix)
		} else {
			c.Ipip6, c.Ipip6Mask = bpfAddrOf(prefix.Masked().Addr()), hostMask(prefix)
		}
	}
	if want.MTU >= leastMTU {
		c.Mss4 = uint16(want.MTU - outerBytes - 4 - 20 - tcpBytes)
		c.Mss6 = uint16(want.MTU - outerBytes - 16 - 40 - tcpBytes)
	}
	return c, nil
}

// natConstants are where mode NAT's packets to backends come from.
func (d *Dataplane) natConstants(c *bpfConfig, plan lb.Plan) error {
	for _, addr := range plan.NATAddresses {
		if why := lb.Unusable(addr); why != "" {
			return fmt.Errorf("refuse Node %s: spec.natAddresses: %s %s", plan.Node, addr, why)
		}
		to, count := &c.Nat6, &c.Nat6Count
		if addr.Is4() {
			to, count = &c.Nat4, &c.Nat4Count
		}
		if int(*count) == len(to) {
			return fmt.Errorf("refuse Node %s: spec.natAddresses: more than %d of one family", plan.Node, len(to))
		}
		to[*count] = bpfAddrOf(addr)
		*count++
	}
	if len(plan.NATAddresses) > 0 {
		c.NatFirst = d.config.NATPorts.First
		c.NatPorts = d.config.NATPorts.Last - d.config.NATPorts.First + 1
	}
	return nil
}

// withDefaults fills in the timeouts that are not set.
func withDefaults(t lb.Timeouts) lb.Timeouts {
	set := func(to *time.Duration, value time.Duration) {
		if *to <= 0 {
			*to = value
		}
	}
	set(&t.TCP, defaultTCP)
	set(&t.UDP, defaultUDP)
	set(&t.Closing, defaultClose)
	return t
}

// hostMask has the bits set that are free within the prefix.
func hostMask(p netip.Prefix) bpfAddr {
	var b [16]byte
	skip := p.Bits()
	if p.Addr().Is4() {
		skip += 96
	}
	for i := skip; i < 128; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	return bpfAddrOf(netip.AddrFrom16(b))
}

// withoutBalancer is for nodes that only have role backend.
func (l Limits) withoutBalancer() Limits {
	l.Services, l.Slots, l.Candidates, l.Hints, l.Backends, l.NextHops = 2, 256, 2, 2, 2, 2
	l.SourceRanges, l.Clients, l.NATFlows = 2, 2, 2
	return l
}
