// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"fairlead.dev/fairlead/internal/agent"
	"fairlead.dev/fairlead/internal/dataplane"
	"fairlead.dev/fairlead/internal/status"
)

func traceCommand() *cobra.Command {
	var socket, device, pcap, output, flags string
	c := &cobra.Command{
		Use:   "trace tcp|udp CLIENT:PORT VIP:PORT",
		Short: "Tell what this node would do with a packet, and why",
		Long: `Tell what this node would do with a packet, and why, step by step. The packet goes
through the very program that forwards, on the same maps, but is neither counted
nor recorded, nor sent. Packets come from a 5-tuple or from a pcap file.`,
		Example: `  fairlead trace tcp 198.51.100.7:40000 192.0.2.1:80
  fairlead trace udp [2001:db8:c::7]:4242 [2001:db8::1]:53
  fairlead trace --pcap packets.pcap`,
		Args: args(func(_ *cobra.Command, given []string) error {
			if (pcap == "") != (len(given) == 3) {
				return fmt.Errorf("give either a protocol, client and VIP, or --pcap")
			}
			return nil
		}),
		RunE: func(c *cobra.Command, given []string) error {
			if output != "text" && output != "json" {
				return usage("--output %q; use text or json", output)
			}
			frames, err := traceFrames(given, flags, pcap)
			if err != nil {
				return err
			}
			var d status.Document
			if err := ask(socket, "GET", "/v1/status", nil, &d); err != nil {
				return err
			}
			for _, frame := range frames {
				var trace dataplane.Trace
				if err := ask(socket, "POST", "/v1/trace", agent.TraceRequest{Frame: frame, Interface: device}, &trace); err != nil {
					return err
				}
				if err := writeTrace(c.OutOrStdout(), d, trace, output); err != nil {
					return err
				}
			}
			return nil
		},
	}
	c.Flags().StringVar(&socket, "socket", defaultSocket, socketHelp)
	c.Flags().StringVar(&device, "interface", "", "the device that the packet comes in by (default: the agent's first)")
	c.Flags().StringVar(&pcap, "pcap", "", "a capture file (classic pcap, Ethernet)")
	c.Flags().StringVar(&flags, "flags", "SYN", "of TCP: SYN or ACK")
	c.Flags().StringVarP(&output, "output", "o", "text", "text or json")
	return c
}

func traceFrames(given []string, flags, pcap string) ([][]byte, error) {
	if pcap != "" {
		file, err := os.Open(pcap)
		if err != nil {
			return nil, fmt.Errorf("open the capture: %w", err)
		}
		defer file.Close()
		frames, err := readPcap(file)
		if err == nil && len(frames) == 0 {
			err = errors.New("the capture holds no packets")
		}
		return frames, err
	}
	client, err1 := netip.ParseAddrPort(given[1])
	vip, err2 := netip.ParseAddrPort(given[2])
	if err1 != nil || err2 != nil || client.Addr().Is4() != vip.Addr().Is4() {
		return nil, usage("%q and %q are not two addresses with ports, of one family", given[1], given[2])
	}
	switch given[0] + " " + flags {
	case "tcp SYN":
		return [][]byte{tcpFrame(client, vip, 0x02)}, nil
	case "tcp ACK":
		return [][]byte{tcpFrame(client, vip, 0x10)}, nil
	case "udp SYN", "udp ACK":
		return [][]byte{udpFrame(client, vip)}, nil
	}
	return nil, usage("%q with flags %q; use tcp (SYN or ACK) or udp", given[0], flags)
}

func writeTrace(w io.Writer, d status.Document, t dataplane.Trace, output string) error {
	if output == "json" {
		return json.NewEncoder(w).Encode(t)
	}
	step := func(name, format string, args ...any) {
		fmt.Fprintf(w, "%-10s %s\n", name, fmt.Sprintf(format, args...))
	}
	if t.Tunnel != "" {
		step("tunnel", "came in by %s", t.Tunnel)
	}
	if t.Family == 0 {
		step("parsed as", "neither IPv4 nor IPv6")
	} else {
		step("parsed as", "IPv%d, protocol %d, %s to %s%s", t.Family, t.Protocol, t.Source, t.Destination, suffix(t.Flags))
	}
	for _, s := range d.Services {
		if t.Service == 0 || s.VIP != t.Destination.Addr().String() || s.Port != t.Destination.Port() || s.Protocol != protocolName(t.Protocol) {
			continue
		}
		step("service", "%s/%s", s.Namespace, s.Name)
		step("slot", "%d of %d (hash %016x)", t.Slot, s.Slots, t.Hash)
	}
	if t.Backend != 0 {
		step("backend", "%s%s", t.Target, suffix(standIn(t.Steps)))
		step("sent as", "%s", sentAs(t))
	}
	if t.NextHop != 0 {
		step("next hop", "row %d, device %d", t.NextHop, t.Interface)
	}
	if t.Verdict == "deliver" {
		step("Pod", "%s (flow: %s)", t.Pod, t.FlowState)
	}
	if t.Drop == "" {
		step("verdict", "%s", t.Verdict)
		return nil
	}
	e := status.Explanations[t.Drop]
	step("verdict", "drop, %s: %s; %s", t.Drop, e.Means, e.Remedy)
	return nil
}

// sentAs says whether the backend's node is told to take the packet or asked.
func sentAs(t dataplane.Trace) string {
	switch {
	case t.Verb != "question":
		return "an order: take it"
	case t.Attempt == 0:
		return "a question: is the flow yours? The flow's hint says so"
	case t.Attempt == 1:
		return "a question: is the flow yours? The slot's backend is asked first"
	}
	return fmt.Sprintf("a question: is the flow yours? Candidate %d of the contested slot is asked", t.Attempt-1)
}

func suffix(words []string) string {
	if len(words) == 0 {
		return ""
	}
	return " (" + strings.Join(words, ", ") + ")"
}

func standIn(steps []string) []string {
	for _, s := range steps {
		if s == "stand-in" {
			return []string{"stands in for one that is gone"}
		}
	}
	return nil
}

func protocolName(p uint8) string {
	switch p {
	case 6:
		return "TCP"
	case 17:
		return "UDP"
	}
	return ""
}
