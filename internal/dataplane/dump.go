// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"fmt"
	"io"
	"math/bits"
	"net/netip"
	"slices"
	"strings"

	"fairlead.dev/fairlead/internal/lb"
)

// Dump writes what the maps of both roles hold as sorted text, with names in
// place of numbers, so that two dumps of the same plan are equal.
func (d *Dataplane) Dump(w io.Writer) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.loaded == nil {
		return ErrNotLoaded
	}
	return dump(w, d.maps)
}

// dump reads the maps alone, not what their writers remember.
func dump(w io.Writer, c *contents) error {
	services, err := c.services.All()
	if err != nil {
		return err
	}
	var lines []string
	for key, number := range services {
		lines = append(lines, dumpService(c, key, number))
	}
	pods, err := c.pods.All()
	if err != nil {
		return err
	}
	for key, value := range pods {
		pod := podOf(key, value)
		lines = append(lines, fmt.Sprintf("pod %s/%s serves %v%s\n", pod.Target, pod.Protocol, pod.Serves, dumpAffinity(value)))
	}
	nodes, err := c.lbNodes.All()
	if err != nil {
		return err
	}
	for key := range nodes {
		addr, length := addrOf(key.Address), int(key.PrefixLen)
		if addr.Is4() {
			length -= 96
		}
		lines = append(lines, fmt.Sprintf("lb-node %s\n", netip.PrefixFrom(addr, length)))
	}
	floods, err := c.floods.All()
	if err != nil {
		return err
	}
	for key, flood := range floods {
		target := netip.AddrPortFrom(addrOf(key.Address), swap16(key.Port))
		lines = append(lines, fmt.Sprintf("cookies for %s/%s from %d SYNs a second\n", target, lb.Protocol(key.Proto), flood.Threshold))
	}
	gates, err := dumpGates(c, services)
	if err != nil {
		return err
	}
	lines = append(lines, gates...)
	slices.Sort(lines)
	_, err = io.WriteString(w, strings.Join(lines, ""))
	return err
}

// dumpAffinity says how long a Pod keeps clients of what it serves.
func dumpAffinity(pod bpfPod) string {
	text := ""
	for _, serves := range pod.Serves[:min(pod.Count, podServesMax)] {
		if serves.Affinity != 0 {
			text += fmt.Sprintf(" keeping clients of %s for %s", netip.AddrPortFrom(addrOf(serves.Vip), swap16(serves.Port)), lasts(serves.Affinity))
		}
	}
	return text
}

// dumpGates are the source ranges and limits, by service.
func dumpGates(c *contents, services map[bpfServiceKey]uint32) (lines []string, err error) {
	names := map[uint32]string{}
	for key, number := range services {
		names[number] = lb.FrontendID{VIP: addrOf(key.Vip), Port: swap16(key.Port), Protocol: lb.Protocol(key.Proto)}.String()
	}
	ranges, err := c.sourceRanges.All()
	if err != nil {
		return nil, err
	}
	for key := range ranges {
		addr, length := addrOf(key.Address), int(key.PrefixLen)-32
		if addr.Is4() {
			length -= 96
		}
		lines = append(lines, fmt.Sprintf("range %s of %s\n", netip.PrefixFrom(addr, length), names[bits.ReverseBytes32(key.Service)]))
	}
	limits, err := c.limits.All()
	if err != nil {
		return nil, err
	}
	for number, l := range limits {
		lines = append(lines, fmt.Sprintf("limits of %s: cost %v burst %v, of a client: cost %v burst %v\n", names[number], l.All.Cost, l.All.Burst, l.Client.Cost, l.Client.Burst))
	}
	return lines, nil
}

func dumpService(c *contents, key bpfServiceKey, number uint32) string {
	vip := addrOf(key.Vip)
	if key.Port == 0 && key.Proto == 0 {
		return fmt.Sprintf("vip %s\n", vip)
	}
	id := lb.FrontendID{VIP: vip, Port: swap16(key.Port), Protocol: lb.Protocol(key.Proto)}
	word := c.serviceWords[number]
	width, flags := uint32(word>>serviceBitsShift)&0xff, word>>serviceFlagsShift
	text := fmt.Sprintf("service %s slots %d flags %#x\n", id, slotCount(width), flags)
	share, older := map[uint32]int{}, map[uint32]int{}
	for _, slot := range c.slots[uint32(word) : uint32(word)+slotCount(width)] {
		share[uint32(slot)]++
		for _, candidate := range c.candidates[slot>>candidatesShift].Number {
			if candidate != 0 {
				older[candidate]++
			}
		}
	}
	var rows []string
	for backend, n := range share {
		rows = append(rows, fmt.Sprintf("  %s slots %d\n", dumpBackend(c, backend), n))
	}
	for backend, n := range older {
		rows = append(rows, fmt.Sprintf("  %s candidate for %d\n", dumpBackend(c, backend), n))
	}
	slices.Sort(rows)
	return text + strings.Join(rows, "")
}

func slotCount(width uint32) uint32 {
	if width == 0 {
		return 0
	}
	return 1 << width
}

func dumpBackend(c *contents, number uint32) string {
	if number == 0 {
		return "nobody for new flows:"
	}
	row := c.backends[number]
	text := fmt.Sprintf("backend %s %s %s", netip.AddrPortFrom(addrOf(row.Address), swap16(row.Port)),
		modeNames[bpfMode(row.Mode)], stateName(wordState(row.Word)))
	if row.Tag != 0 {
		text += " tagged" // the tag itself is secret
	}
	if row.Tunnel != (bpfAddr{}) {
		text += fmt.Sprintf(" tunnel %s sum %#x", addrOf(row.Tunnel), row.OuterSum)
	}
	hop := uint32(row.Word)
	if hop == 0 {
		return text + " via fib"
	}
	h := c.nextHops[hop]
	return text + fmt.Sprintf(" via %d %s to %s vlan %d mtu %d", h.Ifindex, lb.HardwareAddr(h.SrcMac), lb.HardwareAddr(h.DstMac), swap16(h.Vlan), h.Mtu)
}

var modeNames = map[bpfMode]string{
	bpfModeMODE_GENEVE: "geneve", bpfModeMODE_IPIP: "ipip", bpfModeMODE_LOCAL: "local", bpfModeMODE_L2: "l2", bpfModeMODE_NAT: "nat",
}
