// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"fairlead.dev/fairlead/internal/agent"
)

func agentCommand() *cobra.Command {
	var path, node string
	c := &cobra.Command{
		Use:   "agent --config FILE",
		Short: "Run the dataplane of this node",
		Long: `Run the dataplane of this node: role LoadBalancer, Backend, or both, as its
Node object says. Objects are read from the sources of the configuration, and
again whenever they change.

SIGHUP reads them at once; SIGTERM and SIGINT stop the agent. The programs that
it attached stay and go on forwarding: see fairlead cleanup.

The configuration, with its defaults:

  node: NAME                     # default: the host's name
  sources: [DIR, FILE]           # required
  interfaces: [eth0]             # required: devices that carry the traffic
  secretFile: FILE               # role LoadBalancer: the shard's secret
  tagFile: FILE                  # else: this node's tag (see fairlead keys)
  peers:                         # who else's flows are asked about; see fairlead keys
    port: 9471                   # the same on all nodes
    certificate: FILE            # of this node, with its key and the authority's
    key: FILE
    authority: FILE
  geneve: {port: 6082, vni: 1}
  socket: /run/fairlead/agent.sock
  metrics: 127.0.0.1:9470        # /metrics /healthz /readyz; "" for none
  pinDir: /sys/fs/bpf/fairlead
  log: {format: text, level: info}
  timeouts: {tcp: 2h10m, udp: 2m, closing: 2m}
  limits: {services: 32768, slots: 4194304, candidates: 262144, hints: 65536,
           backends: 65536, nextHops: 16384, pods: 16384, flows: 1048576,
           pending: 65536, fragments: 16384, lbNodes: 1024, sourceRanges: 131072,
           clients: 65536, affinities: 262144, natFlows: 262144}
  nat: {ports: 61000-65535}      # local ports of mode NAT; see Node.spec.natAddresses
  genericXDP: false              # where a driver has no native XDP
  pureHash: false                # forget who had a slot: breaks connections, to compare`,
		Args: args(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error {
			if path == "" {
				return usage("--config is missing; see fairlead agent --help")
			}
			return runAgent(path, node)
		},
	}
	c.Flags().StringVar(&path, "config", "", "the configuration file")
	c.Flags().StringVar(&node, "node", "", "name of this node (default: as configured, else the host's name)")
	return c
}

func runAgent(path, node string) error {
	config, err := agent.ReadConfig(path)
	if err != nil {
		return exit{exitUsage, err}
	}
	if node != "" {
		config.Node = node
	}
	if err := needRoot("the agent"); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	// After the first signal the next one ends the process at once.
	context.AfterFunc(ctx, stop)
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	return agent.New(config, version, config.Logger(os.Stderr)).Run(ctx, hup)
}
