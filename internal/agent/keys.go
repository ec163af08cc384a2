// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"fairlead.dev/fairlead/internal/flowhash"
	"fairlead.dev/fairlead/internal/lb"
)

// keys reads the shard's secret and this node's tag. A single LB node without
// a secret makes one and keeps it; of several, each would make its own.
func keys(c Config, s lb.Snapshot) (*flowhash.Secret, [8]byte, error) {
	node := lb.NewLocator(s.Nodes).Named(c.Node)
	if node == nil {
		return nil, [8]byte{}, fmt.Errorf("refuse Node %s: not described; add it, or set node in the agent's configuration", c.Node)
	}
	if !node.LoadBalancer && c.TagFile != "" {
		text, err := os.ReadFile(c.TagFile)
		if err != nil {
			return nil, [8]byte{}, fmt.Errorf("tagFile: %w; make it with `fairlead keys`", err)
		}
		tag, err := flowhash.ParseTag(string(text))
		if err != nil {
			return nil, tag, fmt.Errorf("tagFile: %s: %w; make it with `fairlead keys`", c.TagFile, err)
		}
		return nil, tag, nil
	}
	if c.SecretFile == "" {
		return nil, [8]byte{}, errors.New("secretFile: not set (nor tagFile, which is enough on a node without role LoadBalancer); make both with `fairlead keys`")
	}
	secret, err := readSecret(c.SecretFile, lbNodes(s) == 1)
	if err != nil {
		return nil, [8]byte{}, err
	}
	return &secret, secret.Tag(c.Node), nil
}

func lbNodes(s lb.Snapshot) int {
	n := 0
	for _, node := range s.Nodes {
		if node.LoadBalancer {
			n++
		}
	}
	return n
}

func readSecret(path string, mayMake bool) (flowhash.Secret, error) {
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) && mayMake {
		return MakeSecret(path)
	}
	if err != nil {
		return flowhash.Secret{}, fmt.Errorf("secretFile: %w; make it with `fairlead keys`, the same for all LB nodes", err)
	}
	secret, err := flowhash.ParseSecret(string(text))
	if err != nil {
		return secret, fmt.Errorf("secretFile: %s: %w; make it with `fairlead keys`", path, err)
	}
	return secret, nil
}

// MakeSecret makes a shard's secret in a file that does not exist yet.
func MakeSecret(path string) (flowhash.Secret, error) {
	secret, err := flowhash.NewSecret(rand.Reader)
	if err != nil {
		return secret, fmt.Errorf("make the shard's secret: %w", err)
	}
	if err := WriteKey(path, secret.Hex()); err != nil {
		return secret, err
	}
	return secret, nil
}

// WriteKey writes a key for root alone, and never over another.
func WriteKey(path, text string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("make the keys' directory: %w", err)
	}
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("write a key: %w", err)
	}
	if _, err := file.WriteString(text + "\n"); err != nil {
		file.Close()
		return fmt.Errorf("write a key: %w", err)
	}
	return file.Close()
}
