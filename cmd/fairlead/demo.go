// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"fairlead.dev/fairlead/internal/demo"
)

func demoCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "demo [first-light|rollout|health|flood]",
		Short: "Watch Fairlead work in a throwaway network",
		Long: `Watch Fairlead work in a throwaway network of namespaces: a client, a router that
spreads packets by ECMP, 3 LB nodes and 4 workers with 2 Pods each run on this
machine, with real agents and real traffic. Every claim is checked; the exit code
is not 0 when one does not hold. Nothing outside the namespaces is touched.

  first-light  connections are spread over LB nodes and Pods (the default)
  rollout      500 connections outlive a rolling update, an LB node that is lost
               and comes back, and an agent that is killed
  health       servers fail in several ways, and get no new connections
  flood        honest clients connect to a server that is flooded with SYNs`,
		Args:      args(cobra.MatchAll(cobra.MaximumNArgs(1), cobra.OnlyValidArgs)),
		ValidArgs: []string{"first-light", "rollout", "health", "flood"},
		RunE: func(c *cobra.Command, scene []string) error {
			if err := needRoot("the demo"); err != nil {
				return err
			}
			binary, err := os.Executable()
			if err != nil {
				return fmt.Errorf("find this program: %w", err)
			}
			ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
			defer stop()
			d := demo.Demo{Out: c.OutOrStdout(), Binary: binary, Live: onTerminal(c.OutOrStdout())}
			scenes := map[string]func(context.Context) error{"first-light": d.FirstLight, "rollout": d.Rollout, "health": d.Health, "flood": d.Flood}
			return scenes[append(scene, "first-light")[0]](ctx)
		},
	}
}
