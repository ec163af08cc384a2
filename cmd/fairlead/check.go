// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"fairlead.dev/fairlead/internal/agent"
	"fairlead.dev/fairlead/internal/dataplane"
)

func checkCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "check [INTERFACE...]",
		Short: "Tell what this machine lacks, and what that costs",
		Long: `Tell what of the kernel Fairlead would use, whether it is there, and what is lost
without it. Features are found by trying them, never by version. With names of
interfaces, native XDP is tried on each for a moment, unless it carries XDP.

Exit code 1: something essential is missing.`,
		RunE: func(c *cobra.Command, interfaces []string) error {
			if err := needRoot("the check"); err != nil {
				return err
			}
			missing := 0
			for _, f := range dataplane.Check(interfaces) {
				if f.Present {
					fmt.Fprintf(c.OutOrStdout(), "ok       %s\n", f.Name)
					continue
				}
				word := "missing "
				if f.Essential {
					word = "MISSING "
					missing++
				}
				fmt.Fprintf(c.OutOrStdout(), "%s %s: without it, %s; %s (%s)\n", word, f.Name, f.Without, f.Remedy, f.Problem)
			}
			if missing > 0 {
				return exit{exitFailed, fmt.Errorf("%d essential features are missing", missing)}
			}
			return nil
		},
	}
}

func cleanupCommand() *cobra.Command {
	var dir string
	c := &cobra.Command{
		Use:   "cleanup",
		Short: "Detach and remove everything that an agent left on this machine",
		Long:  "Detach and remove everything that an agent left on this machine: programs, maps and pins. Forwarding stops. Stop the agent first.",
		Args:  args(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			if err := needRoot("cleanup"); err != nil {
				return err
			}
			return dataplane.Cleanup(dir)
		},
	}
	c.Flags().StringVar(&dir, "pin-dir", agent.DefaultPinDir, "the agent's pinDir")
	return c
}

func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  args(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error {
			fmt.Fprintln(c.OutOrStdout(), version)
			return nil
		},
	}
}
