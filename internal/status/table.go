// SPDX-License-Identifier: Apache-2.0

package status

import (
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
)

// WriteTable writes a document for people. Wide adds nodes, tunnels and bytes.
func WriteTable(w io.Writer, d Document, wide bool) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintf(t, "Node %s (%s), version %s, agent up %s\n", d.Node, strings.Join(d.Roles, ", "), d.Version, age(d.Now, d.Since))
	if d.Programmed {
		fmt.Fprintf(t, "The maps hold the plan, read back %s ago; the plan last changed %s ago.\n", age(d.Now, d.ProgrammedAt), age(d.Now, d.ChangedAt))
	} else {
		fmt.Fprintf(t, "The maps do NOT hold the plan: %s\n", d.Problem)
	}
	for _, a := range d.Attachments {
		fmt.Fprintf(t, "XDP on %s (%s)\n", a.Interface, a.Mode)
	}
	writeServices(t, d, wide)
	if wide {
		writePods(t, d)
	}
	writeCounts(t, d)
	if len(d.Findings)+len(d.Unresolved) > 0 {
		fmt.Fprintf(t, "\nFINDINGS\n")
		for _, f := range d.Findings {
			fmt.Fprintln(t, f.Error())
		}
		for _, u := range d.Unresolved {
			fmt.Fprintf(t, "next hop: %s\n", u)
		}
	}
	return t.Flush()
}

func age(now, then time.Time) string {
	if then.IsZero() {
		return "never"
	}
	return now.Sub(then).Round(100 * time.Millisecond).String()
}

func writeServices(t io.Writer, d Document, wide bool) {
	if len(d.Services) == 0 {
		return
	}
	head := "\nSERVICE\tADDRESS\tSLOTS\tBACKEND\tSTATE\tSHARE\tPACKETS\tCONNECTIONS"
	if wide {
		head += "\tBYTES\tNODE\tMODE\tTUNNEL\tNEXT HOP"
	}
	fmt.Fprintln(t, head)
	for _, s := range d.Services {
		contested := ""
		if s.Contested > 0 {
			contested = fmt.Sprintf("%d contested; %s ago %.1f%% moved", s.Contested, age(d.Now, s.ChangedAt), 100*s.Moved)
		}
		imbalance := ""
		if s.Imbalance > 0 {
			imbalance = fmt.Sprintf("%.2fx at most", s.Imbalance)
		}
		fmt.Fprintf(t, "%s/%s\t%s/%s\t%d\t%d backends\t%s\t%s\t%d\t%d\n", s.Namespace, s.Name,
			net.JoinHostPort(s.VIP, strconv.Itoa(int(s.Port))), s.Protocol, s.Slots, len(s.Backends), contested, imbalance, s.Packets, s.Connections)
		if wide && s.Keeps != "" {
			fmt.Fprintf(t, "\t\t\t%s\n", s.Keeps)
		}
		if s.Problem != "" {
			fmt.Fprintf(t, "\t\t\t%s\n", s.Problem)
		}
		for _, b := range s.Backends {
			state := b.State
			if b.Wanted != b.State {
				state += " (wanted: " + b.Wanted + ")"
			}
			if !b.LeavingSince.IsZero() {
				state += " for " + age(d.Now, b.LeavingSince)
			}
			if b.Flows != nil {
				state += fmt.Sprintf(", has %d flows", *b.Flows)
			}
			if b.Check != "" && b.Check != "passes" {
				state += " (check: " + b.Check + ")"
			}
			fmt.Fprintf(t, "\t\t\t%s\t%s\t%.1f%%\t%d\t%d", b.Address, state, 100*b.Share, b.Packets, b.Connections)
			if wide {
				fmt.Fprintf(t, "\t%d\t%s\t%s\t%s\t%s", b.Bytes, b.Node, b.Mode, b.Tunnel, b.NextHop)
			}
			fmt.Fprintln(t)
		}
	}
}

func writePods(t io.Writer, d Document) {
	if len(d.Pods) == 0 {
		return
	}
	fmt.Fprintf(t, "\nPOD OF THIS NODE\tSERVES\n")
	for _, p := range d.Pods {
		fmt.Fprintf(t, "%s/%s\t%s\n", p.Address, p.Protocol, strings.Join(p.Serves, ", "))
	}
	fmt.Fprintf(t, "\nMAP\tUSED\tOF\n")
	for _, c := range d.Capacity {
		used := strconv.Itoa(c.Used)
		if c.Used < 0 {
			used = "-"
		}
		fmt.Fprintf(t, "%s\t%s\t%d\n", c.Map, used, c.Max)
	}
}

func writeCounts(t io.Writer, d Document) {
	if len(d.Drops) > 0 {
		fmt.Fprintf(t, "\nDROPPED\tPACKETS\tMEANS\n")
		for _, c := range d.Drops {
			fmt.Fprintf(t, "%s\t%d\t%s\n", c.Name, c.Count, Explanations[c.Name].Means)
		}
	}
	if len(d.Events) > 0 {
		fmt.Fprintf(t, "\nEVENT\tCOUNT\n")
		for _, c := range d.Events {
			fmt.Fprintf(t, "%s\t%d\n", c.Name, c.Count)
		}
	}
}
