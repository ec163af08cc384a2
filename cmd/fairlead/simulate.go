// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"fmt"
	"io"
	"path/filepath"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"fairlead.dev/fairlead/internal/agent"
)

func simulateCommand() *cobra.Command {
	var socket, output string
	c := &cobra.Command{
		Use:   "simulate PATH...",
		Short: "Tell what objects would change, before they do",
		Long: `Tell what the objects in files and directories would change on this LB node, if
they took the place of those in force: for each service, the share of flow hashes
whose backend changes, how many living flows that concerns, and how many are
expected to break, and why. Nothing is changed.`,
		Args: args(cobra.MinimumNArgs(1)),
		RunE: func(c *cobra.Command, paths []string) error {
			if output != "table" && output != "json" {
				return usage("--output %q; use table or json", output)
			}
			var request agent.SimulateRequest
			for _, path := range paths {
				absolute, err := filepath.Abs(path)
				if err != nil {
					return fmt.Errorf("find %s: %w", path, err)
				}
				request.Paths = append(request.Paths, absolute)
			}
			var all []agent.Simulation
			if err := ask(socket, "POST", "/v1/simulate", request, &all); err != nil {
				return err
			}
			return writeSimulation(c.OutOrStdout(), all, output)
		},
	}
	c.Flags().StringVar(&socket, "socket", defaultSocket, socketHelp)
	c.Flags().StringVarP(&output, "output", "o", "table", "table or json")
	return c
}

func writeSimulation(w io.Writer, all []agent.Simulation, output string) error {
	if output == "json" {
		return json.NewEncoder(w).Encode(all)
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "SERVICE\tADDRESS\tSLOTS\tMOVES\tFLOWS\tCONCERNED\tBREAK\tREASON")
	for _, s := range all {
		slots := fmt.Sprint(s.SlotsNow)
		if s.SlotsThen != s.SlotsNow {
			slots += fmt.Sprintf(" -> %d", s.SlotsThen)
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%.1f%%\t%d\t%d\t%d\t%s\n", s.Service, s.Address, slots, 100*s.Moved, s.Flows, s.Concerned, s.Break, s.Reason)
	}
	return t.Flush()
}
