// SPDX-License-Identifier: Apache-2.0

// Command fairlead is a distributed layer-4 load balancer: the agent of LB
// nodes and backends' nodes, and the tools around it.
package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/term"
)

// version is set by the linker.
var version = "development"

// Exit codes.
const (
	exitFailed = 1
	exitUsage  = 2
)

// exit is an error that ends the program with a code of its own. A nil error
// says that all was said already.
type exit struct {
	code int
	err  error
}

func (e exit) Error() string {
	if e.err == nil {
		return ""
	}
	return e.err.Error()
}

func (e exit) Unwrap() error { return e.err }

func usage(format string, args ...any) error { return exit{exitUsage, fmt.Errorf(format, args...)} }

func main() { os.Exit(execute(rootCommand())) }

func execute(root *cobra.Command) int {
	err := root.Execute()
	if err == nil {
		return 0
	}
	if err.Error() != "" {
		fmt.Fprintln(root.ErrOrStderr(), "fairlead:", err)
	}
	var with exit
	if errors.As(err, &with) {
		return with.code
	}
	return exitFailed
}

func rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "fairlead",
		Short: "A distributed layer-4 load balancer with an eBPF dataplane",
		Long: `Fairlead spreads TCP and UDP connections to virtual IPs (VIPs) over backends.

Any number of LB nodes see the packets, each picks the same backend by
consistent hashing, and backends answer clients directly.

Start with:
  fairlead demo             watch it work in network namespaces of its own (root)
  fairlead lint DIR         check your YAML (no root)
  fairlead check            see whether this machine can run it (root)
  fairlead agent --config FILE
                            run it on a node (root)`,
		Args:          noSuchCommand,
		RunE:          func(c *cobra.Command, _ []string) error { return c.Help() },
		SilenceErrors: true,
		SilenceUsage:  true,
		Version:       version,

		DisableFlagsInUseLine:      true,
		SuggestionsMinimumDistance: 2,
	}
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return usage("%w; see %s --help", err, c.CommandPath())
	})
	root.AddCommand(agentCommand(), checkCommand(), cleanupCommand(), demoCommand(), drainCommand(), keysCommand(), lintCommand(), simulateCommand(), statusCommand(), traceCommand(), versionCommand())
	return root
}

// args turns cobra's complaints about arguments into usage errors.
func args(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(c *cobra.Command, given []string) error {
		if err := check(c, given); err != nil {
			return usage("%w; see %s --help", err, c.CommandPath())
		}
		return nil
	}
}

// noSuchCommand refuses what is left when no command has that name.
func noSuchCommand(root *cobra.Command, given []string) error {
	if len(given) == 0 {
		return nil
	}
	meant := ""
	if near := root.SuggestionsFor(given[0]); len(near) > 0 {
		meant = "; did you mean " + strings.Join(near, " or ") + "?"
	}
	return usage("unknown command %q%s; see fairlead --help", given[0], meant)
}

// onTerminal reports whether escape sequences may be written.
func onTerminal(w io.Writer) bool {
	file, ok := w.(*os.File)
	return ok && term.IsTerminal(int(file.Fd())) && os.Getenv("NO_COLOR") == ""
}

func needRoot(what string) error {
	if os.Geteuid() != 0 {
		return exit{exitFailed, fmt.Errorf("%s needs root; run: sudo %s", what, commandLine())}
	}
	return nil
}

func commandLine() string {
	line := ""
	for i, arg := range os.Args {
		if i > 0 {
			line += " "
		}
		line += arg
	}
	return line
}
