// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"

	"fairlead.dev/fairlead/internal/status"
)

func statusCommand() *cobra.Command {
	var socket, output string
	var watch bool
	c := &cobra.Command{
		Use:   "status",
		Short: "Show what the agent of this node wants, and what its maps hold",
		Long: `Show services, backends and their shares of the slots, packets, drops by reason,
and whether the maps hold what the objects ask for.`,
		Args: args(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error {
			for {
				if watch && onTerminal(c.OutOrStdout()) {
					fmt.Fprint(c.OutOrStdout(), "\x1b[H\x1b[2J")
				}
				if err := printStatus(c.OutOrStdout(), socket, output); err != nil {
					return err
				}
				if !watch {
					return nil
				}
				time.Sleep(time.Second)
			}
		},
	}
	c.Flags().StringVar(&socket, "socket", defaultSocket, socketHelp)
	c.Flags().StringVarP(&output, "output", "o", "table", "table, wide, json or yaml")
	c.Flags().BoolVarP(&watch, "watch", "w", false, "show it again every second")
	return c
}

func printStatus(w io.Writer, socket, output string) error {
	var d status.Document
	write := func() error { return status.WriteTable(w, d, output == "wide") }
	switch output {
	case "table", "wide":
	case "json":
		write = func() error {
			encoder := json.NewEncoder(w)
			encoder.SetIndent("", "  ")
			return encoder.Encode(d)
		}
	case "yaml":
		write = func() error {
			text, err := yaml.Marshal(d)
			if err == nil {
				_, err = w.Write(text)
			}
			return err
		}
	default:
		return usage("--output %q; use table, wide, json or yaml", output)
	}
	if err := ask(socket, "GET", "/v1/status", nil, &d); err != nil {
		return err
	}
	return write()
}
