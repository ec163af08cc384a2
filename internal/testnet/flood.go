// SPDX-License-Identifier: Apache-2.0

package testnet

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"

	"github.com/cilium/ebpf"
)

// FloodSources are the made-up clients of a Flood.
var FloodSources = netip.MustParsePrefix("100.64.0.0/10")

// liveFrames is BPF_F_TEST_XDP_LIVE_FRAMES: what the test run makes is sent.
const liveFrames = 1 << 1

// floodContext is what the kernel's test run takes for an XDP program.
type floodContext struct {
	Data, DataEnd, DataMeta, IngressIfindex, RxQueueIndex, EgressIfindex uint32
}

// Flood sends SYNs of made-up clients to an IPv4 VIP by way of one LB node, on
// whose link they appear as if they came from the router, until ctx ends. It
// returns how many it sent.
func (n *Network) Flood(ctx context.Context, node *Node, vip netip.AddrPort) (sent uint64, err error) {
	spec, err := loadBpf()
	if err != nil {
		return 0, err
	}
	out, err := n.Router.Device(node.Link)
	if err != nil {
		return 0, err
	}
	link, err := n.Router.Netlink.LinkByIndex(out)
	if err != nil {
		return 0, fmt.Errorf("find device %s: %w", node.Link, err)
	}
	theirs, err := node.MAC()
	if err != nil {
		return 0, err
	}
	base := FloodSources.Addr().As4()
	if err := spec.Variables["flood_base"].Set(binary.BigEndian.Uint32(base[:])); err != nil {
		return 0, err
	}
	if err := spec.Variables["flood_out"].Set(uint32(out)); err != nil {
		return 0, err
	}
	// Answers to nobody go nowhere.
	if err := n.Router.SetRoute(Route{To: FloodSources, Blackhole: true}); err != nil {
		return 0, err
	}
	var objects bpfObjects
	if err := spec.LoadAndAssign(&objects, nil); err != nil {
		return 0, fmt.Errorf("load the flood: %w", err)
	}
	defer objects.Close()
	frame := synFrame(netip.AddrPortFrom(FloodSources.Addr(), 1024), vip)
	copy(frame, theirs)
	copy(frame[6:], link.Attrs().HardwareAddr)
	checksums4(frame)
	var all atomic.Uint64
	var wait sync.WaitGroup
	errs := make([]error, floodThreads)
	for i := range errs {
		wait.Go(func() {
			errs[i] = n.Router.Do(func() error { return send(ctx, objects.Flood, frame, &all) })
		})
	}
	wait.Wait()
	return all.Load(), errors.Join(errs...)
}

// A test run takes tens of milliseconds to begin, whatever its length; and who
// sends more at once than a veth's ring holds loses it. So many send little.
const (
	floodThreads = 48
	floodBatch   = 192
)

func send(ctx context.Context, program *ebpf.Program, frame []byte, sent *atomic.Uint64) error {
	for ctx.Err() == nil {
		options := ebpf.RunOptions{Data: frame, Repeat: floodBatch, Flags: liveFrames, Context: floodContext{DataEnd: uint32(len(frame)), IngressIfindex: 1}}
		if _, err := program.Run(&options); err != nil {
			return fmt.Errorf("send the flood: %w", err)
		}
		sent.Add(floodBatch)
	}
	return nil
}

// checksums4 fills in those of an IPv4 frame of TCP without options.
func checksums4(frame []byte) {
	ip, tcp := frame[14:34], frame[34:54]
	binary.BigEndian.PutUint16(ip[10:], ^sum16(0, ip))
	binary.BigEndian.PutUint16(tcp[16:], ^sum16(6+uint32(len(tcp)), ip[12:20], tcp))
}

func sum16(sum uint32, pieces ...[]byte) uint16 {
	for _, piece := range pieces {
		for i := 0; i < len(piece); i += 2 {
			sum += uint32(binary.BigEndian.Uint16(piece[i:]))
		}
	}
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	return uint16(sum)
}
