// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// objects are the programs and maps in the kernel.
type objects struct {
	bpfObjects
	spec *ebpf.CollectionSpec
}

// kept are the maps that outlive the agent: where they fit, it goes on with
// what is in them.
var kept = []string{"flows", "pending", "fragments", "pods", "affinities", "nat_flows"}

func loadObjects(cfg Config, constant bpfConfig, balancer bool) (*objects, error) {
	spec, err := loadBpf()
	if err != nil {
		return nil, fmt.Errorf("read the compiled BPF programs: %w", err)
	}
	limits := cfg.Limits
	if !balancer {
		limits = limits.withoutBalancer()
	}
	for name, size := range map[string]int{
		"services":      2 * limits.Services, // each may have a VIP of its own, which is an entry too
		"service_words": limits.Services, "service_counters": limits.Services, "service_denials": limits.Services,
		"candidates": limits.Candidates, "hints": limits.Hints, "syns": max(limits.Hints/4, 2), "slots": limits.Slots,
		"backends": limits.Backends, "backend_counters": limits.Backends, "next_hops": limits.NextHops,
		"pods": limits.Pods, "floods": limits.Pods, "flows": limits.Flows, "pending": limits.Pending, "fragments": limits.Fragments,
		"lb_nodes": limits.LBNodes, "affinities": limits.Affinities, "nat_flows": limits.NATFlows,
		"source_ranges": limits.SourceRanges, "service_limits": limits.Services, "client_buckets": limits.Clients,
		"probes": min(max(limits.Backends, 2), 1<<17),
	} {
		spec.Maps[name].MaxEntries = uint32(size)
	}
	reuse, err := adoptMaps(cfg, spec)
	if err != nil {
		return nil, err
	}
	o := &objects{spec: spec}
	if err := o.loadWith(constant, reuse); err != nil {
		return nil, err
	}
	for _, m := range reuse {
		m.Close() // loadWith has its own copy
	}
	if err := o.pinMaps(cfg.PinDir); err != nil {
		o.close()
		return nil, err
	}
	return o, nil
}

// mapPin names a pinned map after the layout too: what another version of the
// agent left, whose values mean something else, is never adopted.
func mapPin(dir, name string) string {
	return filepath.Join(dir, fmt.Sprintf("%s-v%d", name, layoutVersion))
}

// adoptMaps opens the pinned maps that are still of the right shape. Others
// are replaced: their flows are lost, which is said.
func adoptMaps(cfg Config, spec *ebpf.CollectionSpec) (map[string]*ebpf.Map, error) {
	reuse := map[string]*ebpf.Map{}
	for _, name := range kept {
		path := mapPin(cfg.PinDir, name)
		m, err := ebpf.LoadPinnedMap(path, nil)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil {
			if err = spec.Maps[name].Compatible(m); err == nil {
				reuse[name] = m
				continue
			}
			m.Close()
		}
		cfg.Log.Warn("pinned map is of another shape: starting with an empty one", "map", path, "error", err)
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("remove the old map %s: %w", path, err)
		}
	}
	return reuse, nil
}

func (o *objects) pinMaps(dir string) error {
	all := o.shared()
	for _, name := range kept {
		m, path := all[name], mapPin(dir, name)
		if _, err := os.Stat(path); err == nil {
			continue
		}
		if m.IsPinned() { // somebody removed the pin
			if err := m.Unpin(); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("forget the pin %s that was removed: %w", path, err)
			}
		}
		if err := m.Pin(path); err != nil {
			return fmt.Errorf("pin map %s: %w", path, err)
		}
	}
	return nil
}

// loadWith loads the programs with these constants on the given maps.
func (o *objects) loadWith(constant bpfConfig, reuse map[string]*ebpf.Map) error {
	spec := o.spec.Copy()
	if err := spec.Variables["config"].Set(constant); err != nil {
		return fmt.Errorf("set the programs' constants: %w", err)
	}
	err := spec.LoadAndAssign(&o.bpfObjects, &ebpf.CollectionOptions{MapReplacements: reuse})
	var refused *ebpf.VerifierError
	switch {
	case errors.As(err, &refused):
		return fmt.Errorf("load the BPF programs: the kernel refuses them, run `fairlead check` to see what it lacks: %w", refused)
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("load the BPF programs: %w; run as root, or with CAP_BPF and CAP_NET_ADMIN", err)
	case err != nil:
		return fmt.Errorf("load the BPF programs: %w", err)
	}
	return nil
}

// reload loads the programs anew with other constants, on the same maps.
func (o *objects) reload(constant bpfConfig) (*objects, error) {
	fresh := &objects{spec: o.spec}
	if err := fresh.loadWith(constant, o.shared()); err != nil {
		return nil, err
	}
	return fresh, o.close()
}

// shared are all maps by name, for programs of the same node to work on.
func (o *objects) shared() map[string]*ebpf.Map {
	all := map[string]*ebpf.Map{}
	maps := reflect.ValueOf(o.bpfMaps)
	for i := range maps.NumField() {
		all[maps.Type().Field(i).Tag.Get("ebpf")] = maps.Field(i).Interface().(*ebpf.Map)
	}
	return all
}

func (o *objects) close() error { return o.bpfObjects.Close() }

// contents maps the arrays into memory.
func (o *objects) contents() (*contents, error) {
	c := &contents{}
	c.reach(o)
	err := errors.Join(
		mapArray(c, o.ServiceWords, &c.serviceWords), mapArray(c, o.Slots, &c.slots), mapArray(c, o.Candidates, &c.candidates),
		mapArray(c, o.ServiceDenials, &c.denials), mapArray(c, o.VipBits, &c.vipBits),
		mapArray(c, o.Backends, &c.backends), mapArray(c, o.NextHops, &c.nextHops))
	if err != nil {
		return nil, errors.Join(err, c.unmap())
	}
	return c, nil
}

// reach makes these objects' maps those that are written by system calls. The
// arrays in memory are the same for all objects that share them.
func (c *contents) reach(o *objects) {
	c.services, c.pods = kernelMap[bpfServiceKey, uint32]{o.Services}, kernelMap[bpfPodKey, bpfPod]{o.Pods}
	c.lbNodes, c.floods = kernelMap[bpfLbNodeKey, uint32]{o.LbNodes}, kernelMap[bpfPodKey, bpfFlood]{o.Floods}
	c.sourceRanges, c.limits = kernelMap[bpfSourceKey, uint32]{o.SourceRanges}, kernelMap[uint32, bpfServiceLimit]{o.ServiceLimits}
	c.purge = o.purgeFlows
}

func mapArray[T any](c *contents, m *ebpf.Map, to *[]T) error {
	size := int(m.ValueSize()) * int(m.MaxEntries())
	pages := (size + os.Getpagesize() - 1) &^ (os.Getpagesize() - 1)
	memory, err := unix.Mmap(m.FD(), 0, pages, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("map %s into memory: %w", m, err)
	}
	c.mapped = append(c.mapped, memory)
	*to = unsafe.Slice((*T)(unsafe.Pointer(&memory[0])), m.MaxEntries())
	return nil
}

// unmap makes the arrays unusable.
func (c *contents) unmap() error {
	var errs []error
	for _, memory := range c.mapped {
		errs = append(errs, unix.Munmap(memory))
	}
	c.mapped = nil
	return errors.Join(errs...)
}

// kernelMap is a hash map or trie in the kernel.
type kernelMap[K comparable, V any] struct{ m *ebpf.Map }

func (k kernelMap[K, V]) Put(key K, value V) error {
	if err := k.m.Put(key, value); err != nil {
		return fmt.Errorf("write %s: %w", k.m, err)
	}
	return nil
}

func (k kernelMap[K, V]) Delete(key K) error {
	if err := k.m.Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("delete from %s: %w", k.m, err)
	}
	return nil
}

func (k kernelMap[K, V]) All() (map[K]V, error) {
	all := map[K]V{}
	var key K
	var value V
	each := k.m.Iterate()
	for each.Next(&key, &value) {
		all[key] = value
	}
	if err := each.Err(); err != nil {
		return nil, fmt.Errorf("read %s: %w", k.m, err)
	}
	return all, nil
}

// checkPinDir makes the directory and demands that it is on a BPF file system.
func checkPinDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("pinDir: %w; mount the BPF file system (mount -t bpf bpf /sys/fs/bpf)", err)
	}
	var found unix.Statfs_t
	if err := unix.Statfs(dir, &found); err != nil {
		return fmt.Errorf("pinDir: stat %s: %w", dir, err)
	}
	if found.Type != unix.BPF_FS_MAGIC {
		return fmt.Errorf("pinDir: %s is not on a BPF file system; mount one (mount -t bpf bpf /sys/fs/bpf) or name a directory on one", dir)
	}
	return nil
}
