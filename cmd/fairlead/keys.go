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
	"time"

	"github.com/spf13/cobra"

	"fairlead.dev/fairlead/internal/agent"
	"fairlead.dev/fairlead/internal/flowhash"
	"fairlead.dev/fairlead/internal/peer"
)

func keysCommand() *cobra.Command {
	var dir string
	c := &cobra.Command{
		Use:   "keys --dir DIR NODE...",
		Short: "Make the shard's secret, and each node's tag and certificate",
		Long: `Make the shard's secret (DIR/shard.secret, for LB nodes alone), and for each named
node, for that node alone, its tag (DIR/tags/NODE.tag) and the certificate and
key by which agents know each other (DIR/tls/NODE.crt, .key). DIR/ca.crt belongs
on every node, DIR/ca.key on none. What exists is kept: run it again with the
names of new nodes.`,
		Args: args(cobra.MinimumNArgs(1)),
		RunE: func(c *cobra.Command, nodes []string) error {
			for _, node := range nodes {
				if node == "" || strings.ContainsAny(node, "/\x00") || node[0] == '.' {
					return usage("%q is not a node's name; nothing was made", node)
				}
			}
			path := filepath.Join(dir, "shard.secret")
			secret, err := readOrMakeSecret(path)
			if err != nil {
				return err
			}
			fmt.Fprintln(c.OutOrStdout(), path)
			authority, err := readOrMakeAuthority(dir)
			if err != nil {
				return err
			}
			for _, node := range nodes {
				tag := secret.Tag(node)
				path := filepath.Join(dir, "tags", node+".tag")
				if err := agent.WriteKey(path, hex.EncodeToString(tag[:])); err != nil && !errors.Is(err, fs.ErrExist) {
					return err
				}
				fmt.Fprintln(c.OutOrStdout(), path)
				certificate := filepath.Join(dir, "tls", node+".crt")
				if err := issue(authority, node, certificate); err != nil {
					return err
				}
				fmt.Fprintln(c.OutOrStdout(), certificate)
			}
			return nil
		},
	}
	c.Flags().StringVar(&dir, "dir", "keys", "where the files go")
	return c
}

// readOrMakeAuthority reads the authority of a directory, or makes one.
func readOrMakeAuthority(dir string) (*peer.Authority, error) {
	certificatePath, keyPath := filepath.Join(dir, "ca.crt"), filepath.Join(dir, "ca.key")
	certificate, err := os.ReadFile(certificatePath)
	if errors.Is(err, fs.ErrNotExist) {
		authority, certificate, key, err := peer.NewAuthority(time.Now())
		if err != nil {
			return nil, err
		}
		return authority, writePair(keyPath, key, certificatePath, certificate)
	}
	if err != nil {
		return nil, fmt.Errorf("read the authority's certificate: %w", err)
	}
	key, err := os.ReadFile(keyPath)
	if err != nil {
		return nil, fmt.Errorf("read the authority's key: %w; put it back, or remove %s to begin anew", err, certificatePath)
	}
	return peer.ParseAuthority(certificate, key)
}

// issue makes a node's certificate and key, unless they are there.
func issue(authority *peer.Authority, node, path string) error {
	if _, err := os.Stat(path); err == nil {
		return nil
	}
	certificate, key, err := authority.Issue(node, time.Now())
	if err != nil {
		return err
	}
	return writePair(strings.TrimSuffix(path, ".crt")+".key", key, path, certificate)
}

// writePair writes a key, then its certificate: never one that is of another key.
func writePair(keyPath string, key []byte, certificatePath string, certificate []byte) error {
	err := agent.WriteKey(keyPath, string(key))
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%w, but not its certificate %s; put it back, or remove the key to make both anew", err, certificatePath)
	}
	if err != nil {
		return err
	}
	return agent.WriteKey(certificatePath, string(certificate))
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
