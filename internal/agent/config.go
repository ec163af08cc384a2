// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"fairlead.dev/fairlead/internal/dataplane"
)

// Config is the agent's configuration file.
type Config struct {
	Node       string   `yaml:"node"`       // name of this node; default: the host's
	Sources    []string `yaml:"sources"`    // files and directories of objects
	Interfaces []string `yaml:"interfaces"` // devices that carry XDP
	SecretFile string   `yaml:"secretFile"` // of the shard; LB nodes only
	TagFile    string   `yaml:"tagFile"`    // of this node, where it has no secret
	Geneve     struct {
		Port uint16 `yaml:"port"`
		VNI  uint32 `yaml:"vni"`
	} `yaml:"geneve"`
	// Peers is how agents ask each other which flows backends own. Without
	// certificates they do not, and contests last as long as flows may idle.
	Peers struct {
		Port        uint16 `yaml:"port"`
		Certificate string `yaml:"certificate"` // of this node
		Key         string `yaml:"key"`
		Authority   string `yaml:"authority"` // the certificate that all are signed by
	} `yaml:"peers"`
	// NAT is how LB nodes reach backends of services of mode NAT.
	NAT struct {
		Ports string `yaml:"ports"` // local ports, e.g. 61000-65535, that no socket of this node uses
	} `yaml:"nat"`
	Socket  string `yaml:"socket"`  // of the status API
	Metrics string `yaml:"metrics"` // address of /metrics, /healthz, /readyz; "" for none
	PinDir  string `yaml:"pinDir"`
	Log     struct {
		Format string `yaml:"format"` // text or json
		Level  string `yaml:"level"`  // debug, info, warn, error
	} `yaml:"log"`
	Limits struct {
		Services   int `yaml:"services"`
		Slots      int `yaml:"slots"`
		Candidates int `yaml:"candidates"`
		Hints      int `yaml:"hints"`
		Backends   int `yaml:"backends"`
		NextHops   int `yaml:"nextHops"`
		Pods       int `yaml:"pods"`
		Flows      int `yaml:"flows"`
		Pending    int `yaml:"pending"`
		Fragments  int `yaml:"fragments"`
		LBNodes    int `yaml:"lbNodes"`
		// Of all services: source ranges, clients whose rates are counted, and on
		// backends' nodes clients with affinity.
		SourceRanges int `yaml:"sourceRanges"`
		Clients      int `yaml:"clients"`
		Affinities   int `yaml:"affinities"`
		NATFlows     int `yaml:"natFlows"`
	} `yaml:"limits"`
	Timeouts struct {
		TCP     time.Duration `yaml:"tcp"`
		UDP     time.Duration `yaml:"udp"`
		Closing time.Duration `yaml:"closing"`
	} `yaml:"timeouts"`
	GenericXDP bool `yaml:"genericXDP"`
	// PureHash forgets who had a slot, for comparison: connections break when
	// backends change.
	PureHash bool `yaml:"pureHash"`
}

// DefaultSocket is where the status API listens.
const DefaultSocket = "/run/fairlead/agent.sock"

// DefaultPinDir is where programs and maps are pinned.
const DefaultPinDir = "/sys/fs/bpf/fairlead"

// ReadConfig reads a configuration file, strictly, and fills in the defaults.
func ReadConfig(path string) (Config, error) {
	var c Config
	c.Geneve.Port, c.Geneve.VNI, c.Peers.Port = 6082, 1, 9471
	c.Socket, c.PinDir, c.Metrics = DefaultSocket, DefaultPinDir, "127.0.0.1:9470"
	c.Log.Format, c.Log.Level = "text", "info"
	c.NAT.Ports = fmt.Sprintf("%d-%d", dataplane.DefaultNATPorts.First, dataplane.DefaultNATPorts.Last)
	c.Timeouts.TCP, c.Timeouts.UDP, c.Timeouts.Closing = 2*time.Hour+10*time.Minute, 2*time.Minute, 2*time.Minute
	text, err := os.ReadFile(path)
	if err != nil {
		return c, fmt.Errorf("read the configuration: %w", err)
	}
	decoder := yaml.NewDecoder(bytes.NewReader(text))
	decoder.KnownFields(true)
	if err := decoder.Decode(&c); err != nil && !errors.Is(err, io.EOF) {
		return c, fmt.Errorf("%s: %w; correct it (`fairlead agent --help` lists all fields)", path, err)
	}
	if c.Node == "" {
		if c.Node, err = os.Hostname(); err != nil {
			return c, fmt.Errorf("node: %w; set it", err)
		}
	}
	if err := c.validate(); err != nil {
		return c, fmt.Errorf("%s: %w", path, err)
	}
	return c, nil
}

func (c *Config) validate() error {
	switch {
	case len(c.Sources) == 0:
		return errors.New("sources: empty; name the files or directories that hold the objects")
	case len(c.Interfaces) == 0:
		return errors.New("interfaces: empty; name the devices that carry the traffic")
	case c.Geneve.Port == 0:
		return errors.New("geneve.port: 0; write a number from 1 to 65535")
	case c.Geneve.VNI >= 1<<24:
		return fmt.Errorf("geneve.vni: %d does not fit 24 bits", c.Geneve.VNI)
	case c.Peers.Certificate == "" != (c.Peers.Key == "") || c.Peers.Certificate == "" != (c.Peers.Authority == ""):
		return errors.New("peers: certificate, key and authority belong together; set all or none")
	case c.natPorts() == (dataplane.PortRange{}):
		return fmt.Errorf("nat.ports: %q; write a range such as 61000-65535", c.NAT.Ports)
	case c.Peers.Port == 0:
		return errors.New("peers.port: 0; write a number from 1 to 65535")
	case c.Log.Format != "text" && c.Log.Format != "json":
		return fmt.Errorf("log.format: %q; use text or json", c.Log.Format)
	case c.Timeouts.TCP < time.Second || c.Timeouts.UDP < time.Second || c.Timeouts.Closing < time.Second:
		return errors.New("timeouts: less than 1s; write e.g. 2h10m")
	}
	var level slog.Level
	if err := level.UnmarshalText([]byte(c.Log.Level)); err != nil {
		return fmt.Errorf("log.level: %q; use debug, info, warn or error", c.Log.Level)
	}
	return nil
}

// natPorts is the range, zero when there is none.
func (c *Config) natPorts() dataplane.PortRange {
	first, last, _ := strings.Cut(c.NAT.Ports, "-")
	a, errA := strconv.ParseUint(first, 10, 16)
	b, errB := strconv.ParseUint(last, 10, 16)
	if errA != nil || errB != nil || a == 0 || b < a {
		return dataplane.PortRange{}
	}
	return dataplane.PortRange{First: uint16(a), Last: uint16(b)}
}

// Logger returns the logger that the configuration asks for.
func (c *Config) Logger(w io.Writer) *slog.Logger {
	var level slog.Level
	if err := level.UnmarshalText([]byte(c.Log.Level)); err != nil {
		level = slog.LevelInfo // validate has seen to it that this does not happen
	}
	options := &slog.HandlerOptions{Level: level}
	if c.Log.Format == "json" {
		return slog.New(slog.NewJSONHandler(w, options))
	}
	return slog.New(slog.NewTextHandler(w, options))
}

func (c *Config) limits() dataplane.Limits {
	l := c.Limits
	return dataplane.Limits{Services: l.Services, Slots: l.Slots, Candidates: l.Candidates, Hints: l.Hints, Backends: l.Backends, NextHops: l.NextHops, Pods: l.Pods,
		Flows: l.Flows, Pending: l.Pending, Fragments: l.Fragments, LBNodes: l.LBNodes,
		SourceRanges: l.SourceRanges, Clients: l.Clients, Affinities: l.Affinities, NATFlows: l.NATFlows}
}
