// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
)

// Cleanup removes every trace of a dataplane from this node: programs, maps,
// pins. Forwarding stops. Where there is nothing, it does nothing.
func Cleanup(pinDir string) error {
	entries, err := os.ReadDir(pinDir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("read pinDir: %w", err)
	}
	var errs []error
	for _, entry := range entries {
		errs = append(errs, unpin(filepath.Join(pinDir, entry.Name())))
	}
	if err == nil {
		errs = append(errs, os.Remove(pinDir))
	}
	return errors.Join(append(errs, removeFilters())...)
}

// unpin removes a pin. A link is detached first: without its pin the kernel
// would do that too, but some time later.
func unpin(path string) error {
	var err error
	if l, notLink := link.LoadPinnedLink(path, nil); notLink == nil {
		err = errors.Join(l.Detach(), l.Close())
	}
	return errors.Join(err, os.Remove(path))
}

// removeFilters removes the tc filters of kernels without tcx.
func removeFilters() error {
	links, err := netlink.LinkList()
	if err != nil {
		return fmt.Errorf("list devices: %w", err)
	}
	var errs []error
	for _, l := range links {
		for _, where := range places {
			ours := filter(l.Attrs().Index, nil, where)
			found, err := netlink.FilterList(l, ours.Parent)
			if err != nil {
				continue // no clsact there
			}
			for _, f := range found {
				if bpf, ok := f.(*netlink.BpfFilter); ok && bpf.Name == ours.Name && bpf.Attrs().Handle == ours.Handle {
					errs = append(errs, netlink.FilterDel(ours))
				}
			}
		}
	}
	return errors.Join(errs...)
}
