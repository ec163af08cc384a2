// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"fmt"
	"net/netip"

	"github.com/cilium/ebpf"
)

// Trace is what the program decided about one frame, and by what.
type Trace struct {
	Source, Destination    netip.AddrPort // of the flow that it belongs to
	Protocol               uint8
	Family                 uint8 // 4, 6, or 0: not IP
	Flags                  []string
	Tunnel                 string         // "geneve" or "ipip" when it came in one
	Target                 netip.AddrPort // of the backend, as in its row
	Service, Slot, Backend uint32         // numbers in the maps
	Hash                   uint64
	NextHop, Interface     uint32
	Verb                   string // "order" or "question", of what was forwarded
	Attempt                uint8  // of a question: 0 the hint, 1 the slot's backend, then its candidates
	Verdict                string // "pass", "forward", "deliver", "answer", "reply", "deny", "drop"
	Drop                   string // the reason, as in bpf/reasons.h without its prefix
	Pod                    netip.AddrPort
	FlowState              string
	Steps                  []string
	Action                 uint32 // XDP's return code
	Out                    []byte // the frame as it left
}

// xdpContext is what the kernel's test run takes for an XDP program.
type xdpContext struct {
	Data, DataEnd, DataMeta, IngressIfindex, RxQueueIndex, EgressIfindex uint32
}

// Trace runs the XDP program, loaded with a constant that keeps it from
// counting and recording, on the same maps, with a frame that came in on the
// given device.
func (d *Dataplane) Trace(frame []byte, ifindex int) (Trace, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.loaded == nil {
		return Trace{}, ErrNotLoaded
	}
	if len(frame) < 14 {
		return Trace{}, fmt.Errorf("trace a frame of %d bytes: Ethernet has 14 at least", len(frame))
	}
	if err := d.startTracing(); err != nil {
		return Trace{}, err
	}
	tracing := d.tracing
	if err := tracing.Traces.Put(uint32(0), bpfTrace{}); err != nil {
		return Trace{}, fmt.Errorf("clear the trace: %w", err)
	}
	out := make([]byte, len(frame)+256)
	in := xdpContext{DataEnd: uint32(len(frame)), IngressIfindex: uint32(ifindex)}
	options := &ebpf.RunOptions{Data: frame, DataOut: out, Context: &in}
	action, err := tracing.FairleadXdp.Run(options)
	if err != nil {
		return Trace{}, fmt.Errorf("run the program on the frame: %w", err)
	}
	var raw bpfTrace
	if err := tracing.Traces.Lookup(uint32(0), &raw); err != nil {
		return Trace{}, fmt.Errorf("read the trace: %w", err)
	}
	t := decodeTrace(raw, action, options.DataOut)
	if t.Backend != 0 && int(t.Backend) < len(d.maps.backends) {
		row := d.maps.backends[t.Backend]
		t.Target = netip.AddrPortFrom(addrOf(row.Address), swap16(row.Port))
	}
	return t, nil
}

// startTracing loads the tracing program, which takes a while, for this trace
// and those after it.
func (d *Dataplane) startTracing() error {
	if d.tracing != nil {
		return nil
	}
	constant := d.constant
	constant.Tracing = 1
	tracing := &objects{spec: d.loaded.spec}
	if err := tracing.loadWith(constant, d.loaded.shared()); err != nil {
		return err
	}
	d.tracing = tracing
	return nil
}

func (d *Dataplane) stopTracing() error {
	if d.tracing == nil {
		return nil
	}
	err := d.tracing.close()
	d.tracing = nil
	return err
}

func decodeTrace(raw bpfTrace, action uint32, out []byte) Trace {
	return Trace{
		Source:      netip.AddrPortFrom(addrOf(raw.Src), swap16(raw.SrcPort)),
		Destination: netip.AddrPortFrom(addrOf(raw.Dst), swap16(raw.DstPort)),
		Protocol:    raw.Proto, Family: raw.Family,
		Flags:   bitNames(uint32(raw.Flags), packetFlags),
		Tunnel:  modeNames[bpfMode(raw.Tunnel)],
		Service: raw.Service, Slot: raw.Slot, Backend: raw.Backend, Hash: raw.Hash,
		NextHop: raw.NextHop, Interface: raw.Ifindex,
		Verb: verbNames[bpfVerb(raw.Verb)], Attempt: raw.Attempt,
		Verdict:   verdictNames[bpfVerdict(raw.Verdict)],
		Drop:      DropNames()[raw.Drop],
		Pod:       netip.AddrPortFrom(addrOf(raw.Pod), swap16(raw.PodPort)),
		FlowState: flowStates[bpfFlowState(raw.FlowState)],
		Steps:     bitNames(uint32(raw.Steps), traceSteps),
		Action:    action, Out: out,
	}
}

var verdictNames = map[bpfVerdict]string{
	bpfVerdictVERDICT_PASS: "pass", bpfVerdictVERDICT_FORWARD: "forward", bpfVerdictVERDICT_DELIVER: "deliver",
	bpfVerdictVERDICT_ANSWER: "answer", bpfVerdictVERDICT_REPLY: "reply", bpfVerdictVERDICT_DROP: "drop", bpfVerdictVERDICT_DENY: "deny",
}

var verbNames = map[bpfVerb]string{bpfVerbVERB_DELIVER: "order", bpfVerbVERB_ASK: "question"}

var flowStates = map[bpfFlowState]string{
	bpfFlowStateFLOW_HALF_OPEN: "half-open", bpfFlowStateFLOW_UNANSWERED: "unanswered",
	bpfFlowStateFLOW_PROVISIONAL: "provisional", bpfFlowStateFLOW_ESTABLISHED: "established", bpfFlowStateFLOW_CLOSING: "closing",
}

type bitName struct {
	bit  uint32
	name string
}

var packetFlags = []bitName{
	{uint32(bpfPacketFlagPACKET_FIRST_FRAGMENT), "first fragment"}, {uint32(bpfPacketFlagPACKET_LATER_FRAGMENT), "later fragment"},
	{uint32(bpfPacketFlagPACKET_SYN), "SYN"}, {uint32(bpfPacketFlagPACKET_ICMP_ERROR), "ICMP error"}, {uint32(bpfPacketFlagPACKET_ECHO), "echo request"},
}

var traceSteps = []bitName{
	{uint32(bpfTraceStepTRACE_PARSED), "parsed"}, {uint32(bpfTraceStepTRACE_SERVICE), "service"}, {uint32(bpfTraceStepTRACE_SLOT), "slot"},
	{uint32(bpfTraceStepTRACE_STAND_IN), "stand-in"}, {uint32(bpfTraceStepTRACE_BACKEND), "backend"}, {uint32(bpfTraceStepTRACE_NEXT_HOP), "next hop"},
	{uint32(bpfTraceStepTRACE_DECAPSULATED), "decapsulated"}, {uint32(bpfTraceStepTRACE_FLOW), "flow"},
}

func bitNames(bits uint32, names []bitName) []string {
	var set []string
	for _, n := range names {
		if bits&n.bit != 0 {
			set = append(set, n.name)
		}
	}
	return set
}
