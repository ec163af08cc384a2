// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"fairlead.dev/fairlead/internal/agent"
	"fairlead.dev/fairlead/internal/flowhash"
)

func keysCommand() *cobra.Command {
	var dir string
	c := &cobra.Command{
		Use:   "keys --dir DIR NODE...",
		Short: "Make the shard's secret, and the tag of each worker",
		Long: `Make the shard's secret (DIR/shard.secret, for LB nodes alone) and the tag of each
named backends' node (DIR/tags/NODE.tag, for that node alone). What exists is
kept: run it again with the names of new nodes.`,
		Args: args(cobra.MinimumNArgs(1)),
		RunE: func(c *cobra.Command, nodes []string) error {
			path := filepath.Join(dir, "shard.secret")
			secret, err := readOrMakeSecret(path)
			if err != nil {
				return err
			}
			fmt.Fprintln(c.OutOrStdout(), path)
			for _, node := range nodes {
				if node == "" || strings.ContainsAny(node, "/\x00") || node[0] == '.' {
					return usage("%q is not a node's name", node)
				}
				tag := secret.Tag(node)
				path := filepath.Join(dir, "tags", node+".tag")
				if err := agent.WriteKey(path, hex.EncodeToString(tag[:])); err != nil && !errors.Is(err, fs.ErrExist) {
					return err
				}
				fmt.Fprintln(c.OutOrStdout(), path)
			}
			return nil
		},
	}
	c.Flags().StringVar(&dir, "dir", "keys", "where the files go")
	return c
}

func readOrMakeSecret(path string) (flowhash.Secret, error) {
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return agent.MakeSecret(path)
	}
	if err != nil {
		return flowhash.Secret{}, fmt.Errorf("read the shard's secret: %w", err)
	}
	secret, err := flowhash.ParseSecret(string(text))
	if err != nil {
		return secret, fmt.Errorf("%s: %w; remove it to make another, which breaks connections once", path, err)
	}
	return secret, nil
}
