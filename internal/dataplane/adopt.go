// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"fairlead.dev/fairlead/internal/lb"
	"fairlead.dev/fairlead/internal/slots"
)

// adopted is what an earlier agent's program, which is still attached, forwards
// by: who has each slot of a frontend, and who may still own older flows.
type adopted map[lb.FrontendID]adoptedTable

type adoptedTable struct {
	owners     []netip.AddrPort // zero: nobody
	candidates map[uint32][]netip.AddrPort
}

// adoptTables reads the tables of the program that is attached to a device by
// a link of ours. None is no error; nor are maps of another shape, which the
// census makes up for.
func adoptTables(pinDir string, interfaces []string) (adopted, error) {
	for _, name := range interfaces {
		l, err := link.LoadPinnedLink(filepath.Join(pinDir, "xdp-"+name), nil)
		if err != nil {
			continue
		}
		defer l.Close()
		info, err := l.Info()
		if err != nil {
			return nil, fmt.Errorf("read what is attached to %s: %w", name, err)
		}
		program, err := ebpf.NewProgramFromID(info.Program)
		if err != nil {
			return nil, fmt.Errorf("open the program that is attached to %s: %w", name, err)
		}
		defer program.Close()
		return tablesOf(program)
	}
	return nil, nil
}

func tablesOf(program *ebpf.Program) (adopted, error) {
	info, err := program.Info()
	if err != nil {
		return nil, fmt.Errorf("read the attached program: %w", err)
	}
	ids, _ := info.MapIDs()
	spec, err := loadBpf()
	if err != nil {
		return nil, err
	}
	found := map[string]*ebpf.Map{}
	defer func() {
		for _, m := range found {
			m.Close()
		}
	}()
	for _, id := range ids {
		m, err := ebpf.NewMapFromID(id)
		if err != nil {
			return nil, fmt.Errorf("open a map of the attached program: %w", err)
		}
		about, err := m.Info()
		if err != nil {
			return nil, errors.Join(fmt.Errorf("read a map of the attached program: %w", err), m.Close())
		}
		if known := spec.Maps[about.Name]; known == nil || known.Type != m.Type() || known.KeySize != m.KeySize() || known.ValueSize != m.ValueSize() {
			m.Close()
			continue
		}
		found[about.Name] = m
	}
	for _, name := range []string{"services", "service_words", "slots", "candidates", "backends"} {
		if found[name] == nil {
			return nil, nil
		}
	}
	c := &contents{services: kernelMap[bpfServiceKey, uint32]{found["services"]}}
	err = errors.Join(mapArray(c, found["service_words"], &c.serviceWords), mapArray(c, found["slots"], &c.slots),
		mapArray(c, found["candidates"], &c.candidates), mapArray(c, found["backends"], &c.backends))
	if err != nil {
		return nil, errors.Join(err, c.unmap())
	}
	tables, err := readTables(c)
	return tables, errors.Join(err, c.unmap())
}

// readTables reads maps that may be of any age: nothing in them is believed to
// be in range.
func readTables(c *contents) (adopted, error) {
	services, err := c.services.All()
	if err != nil {
		return nil, err
	}
	target := func(number uint32) netip.AddrPort {
		if number == 0 || int(number) >= len(c.backends) {
			return netip.AddrPort{}
		}
		return netip.AddrPortFrom(addrOf(c.backends[number].Address), swap16(c.backends[number].Port))
	}
	tables := adopted{}
	for key, number := range services {
		if number == serviceNone || int(number) >= len(c.serviceWords) {
			continue
		}
		word := atomic.LoadUint64(&c.serviceWords[number])
		offset, width := uint64(uint32(word)), word>>serviceBitsShift&0xff
		if width == 0 || width > maxBits || offset+1<<width > uint64(len(c.slots)) {
			continue
		}
		t := adoptedTable{owners: make([]netip.AddrPort, 1<<width), candidates: map[uint32][]netip.AddrPort{}}
		for i := range t.owners {
			slot := atomic.LoadUint64(&c.slots[offset+uint64(i)])
			t.owners[i] = target(uint32(slot))
			row := slot >> candidatesShift
			if row == 0 || row >= uint64(len(c.candidates)) {
				continue
			}
			for _, candidate := range c.candidates[row].Number {
				if who := target(candidate); who.IsValid() {
					t.candidates[uint32(i)] = append(t.candidates[uint32(i)], who)
				}
			}
		}
		id := lb.FrontendID{VIP: addrOf(key.Vip), Port: swap16(key.Port), Protocol: lb.Protocol(key.Proto)}
		tables[id] = t
	}
	return tables, nil
}

// adopt lets a frontend's table begin as the earlier agent left it.
func (b *balancer) adopt(known *frontend, want lb.Frontend, now time.Time) {
	before, ok := b.adopted[want.ID]
	if !ok {
		return
	}
	delete(b.adopted, want.ID)
	numbers := map[netip.AddrPort]uint32{}
	for _, backend := range want.Backends {
		numbers[targetOf(backend.ID)] = b.backends[backend.ID].number
	}
	owners := make([]uint32, len(before.owners))
	for i, target := range before.owners {
		owners[i] = numbers[target]
	}
	candidates := map[uint32]slots.List{}
	for slot, targets := range before.candidates {
		var list slots.List
		n := 0
		for _, target := range targets {
			if number := numbers[target]; number != 0 && number != owners[slot] && !list.Has(number) {
				list[n] = number
				n++
			}
		}
		if n > 0 {
			candidates[slot] = list
		}
	}
	known.table.Restore(owners, candidates, now)
}
