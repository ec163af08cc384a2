// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"fmt"
	"slices"

	"github.com/spf13/cobra"

	"fairlead.dev/fairlead/internal/file"
	"fairlead.dev/fairlead/internal/lb"
	"fairlead.dev/fairlead/internal/plan"
)

func lintCommand() *cobra.Command {
	var output string
	var codes bool
	c := &cobra.Command{
		Use:   "lint PATH...",
		Short: "Check objects in YAML files and directories",
		Long: `Check objects in YAML files and directories, as the agent would read them, and the
plan of every node that they describe. Needs no root.

Exit code 0: nothing found; 1: findings; 2: wrong usage. Codes are stable.`,
		Args: args(func(_ *cobra.Command, paths []string) error {
			if len(paths) == 0 && !codes {
				return fmt.Errorf("no PATH given")
			}
			return nil
		}),
		RunE: func(c *cobra.Command, paths []string) error {
			if codes {
				for _, r := range slices.Concat(file.Rules, plan.Rules) {
					fmt.Fprintf(c.OutOrStdout(), "%s  %-7s  %s; %s\n", r.Code, r.Severity, r.Title, r.Remedy)
				}
				return nil
			}
			return lint(c, paths, output)
		},
	}
	c.Flags().StringVarP(&output, "output", "o", "text", "text or json")
	c.Flags().BoolVar(&codes, "codes", false, "list all codes")
	return c
}

func lint(c *cobra.Command, paths []string, output string) error {
	if output != "text" && output != "json" {
		return usage("--output %q; use text or json", output)
	}
	snapshot, findings := file.Load(paths)
	if !file.Failed(findings) {
		seen := map[lb.Finding]bool{}
		for _, node := range snapshot.Nodes {
			_, more := plan.ForNode(snapshot, node.Name)
			for _, f := range more {
				if !seen[f] {
					seen[f] = true
					findings = append(findings, f)
				}
			}
		}
	}
	if output == "json" {
		// Never nil: "null" is no list.
		if err := json.NewEncoder(c.OutOrStdout()).Encode(append([]lb.Finding{}, findings...)); err != nil {
			return err
		}
	} else {
		for _, f := range findings {
			fmt.Fprintln(c.OutOrStdout(), f.Error())
		}
		fmt.Fprintf(c.ErrOrStderr(), "%d services, %d nodes, %d pools; %d findings\n",
			len(snapshot.Services), len(snapshot.Nodes), len(snapshot.Pools), len(findings))
	}
	if len(findings) > 0 {
		return exit{code: exitFailed}
	}
	return nil
}
