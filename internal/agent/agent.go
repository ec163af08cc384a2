// SPDX-License-Identifier: Apache-2.0

// Package agent is the daemon of LB nodes and backends' nodes: it keeps the
// dataplane what the objects say.
package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"reflect"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink"

	"fairlead.dev/fairlead/internal/dataplane"
	"fairlead.dev/fairlead/internal/file"
	"fairlead.dev/fairlead/internal/health"
	"fairlead.dev/fairlead/internal/lb"
	"fairlead.dev/fairlead/internal/peer"
	"fairlead.dev/fairlead/internal/plan"
	"fairlead.dev/fairlead/internal/route"
	"fairlead.dev/fairlead/internal/run"
)

const (
	resync     = 30 * time.Second // maps are read back, and repaired
	backoff    = 200 * time.Millisecond
	maxBackoff = 10 * time.Second
	spacing    = 2 * time.Millisecond
)

// Agent is one node's. All work is done by its one loop.
type Agent struct {
	config  Config
	version string
	log     *slog.Logger
	started time.Time
	trigger *run.Trigger

	mu          sync.Mutex // of what follows, which the APIs read
	dataplane   *dataplane.Dataplane
	routes      *route.Table
	plan        lb.Plan // the last good one
	findings    []lb.Finding
	unresolved  []string
	problem     error // why the maps may not hold the plan
	programmed  time.Time
	changed     time.Time
	swept       time.Time
	logged      map[string]bool
	filesChange bool
	leaving     map[leaving]time.Time // since when backends take no new flows
	drainBy     time.Time             // when the next one's time is over
	byHand      map[string]bool       // what is drained by hand
	wanted      lb.Plan               // with drains and health, as it was last set
	allOut      map[lb.FrontendID]bool
	heard       map[lb.ProbeID]toldVerdict // from other LB nodes
	awaited     map[lb.ProbeID]time.Time   // what others probe, and since when this node waits for it
	probing     int                        // backends, here

	health     *health.Prober
	forwarding atomic.Pointer[dataplane.Dataplane] // for who must not wait for the loop

	identity *peer.Identity // nil: nobody is asked, and nobody answered
	census   *census

	// What other LB nodes were told of this one's records, for its task alone.
	told    map[uint64]netip.AddrPort
	toldAll time.Time
	// And of its verdicts, the same.
	judged    map[lb.ProbeID]bool
	judgedAll time.Time
}

// New returns an agent that has done nothing yet.
func New(config Config, version string, log *slog.Logger) *Agent {
	a := &Agent{config: config, version: version, log: log, started: time.Now(), trigger: run.NewTrigger(),
		problem: errors.New("starting"), logged: map[string]bool{}, filesChange: true, leaving: map[leaving]time.Time{}, byHand: map[string]bool{}, told: map[uint64]netip.AddrPort{},
		heard: map[lb.ProbeID]toldVerdict{}, awaited: map[lb.ProbeID]time.Time{}, judged: map[lb.ProbeID]bool{}}
	a.health = health.New(a.bindProbe, a.trigger.Fire, log)
	return a
}

// Reload makes the agent read its objects again.
func (a *Agent) Reload() {
	a.mu.Lock()
	a.filesChange = true
	a.mu.Unlock()
	a.trigger.Fire()
}

// Run works until ctx ends, and reads its objects again at each signal of
// reload. Then it lets go: the programs go on forwarding.
func (a *Agent) Run(ctx context.Context, reload <-chan os.Signal) error {
	routes, err := route.New(a.config.Interfaces)
	if err != nil {
		return err
	}
	defer routes.Close()
	a.routes = routes
	defer a.close()
	servers, err := a.servers()
	if err != nil {
		return err
	}
	if c := a.config.Peers; c.Certificate != "" {
		if a.identity, err = peer.LoadIdentity(c.Certificate, c.Key, c.Authority); err != nil {
			return err
		}
		if name := a.identity.Name(); name != a.config.Node {
			return fmt.Errorf("peers.certificate: it names node %q, and this is %q; give each node its own", name, a.config.Node)
		}
		a.census = newCensus(a.identity, c.Port)
		servers = append(servers, a.peerServer(a.identity))
	}
	loop := run.Loop{Trigger: a.trigger, Spacing: spacing, Resync: resync, Backoff: backoff, MaxBackoff: maxBackoff, Work: a.work}
	tasks := append([]run.Task{
		{Name: "agent", Run: loop.Run},
		{Name: "files", Run: func(ctx context.Context) error { return file.Watch(ctx, a.config.Sources, a.Reload) }},
		{Name: "routes", Run: a.watchRoutes},
		{Name: "census", Run: a.watchCensus},
		{Name: "health", Run: a.health.Run},
		{Name: "signals", Run: func(ctx context.Context) error { return a.watchSignals(ctx, reload) }},
	}, servers...)
	a.log.Info("started", "node", a.config.Node, "version", a.version)
	err = run.All(ctx, tasks...)
	a.log.Info("stopped; the programs stay attached and go on forwarding")
	return err
}

func (a *Agent) watchSignals(ctx context.Context, reload <-chan os.Signal) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-reload:
			a.Reload()
		}
	}
}

// watchRoutes begins anew whenever events were lost.
func (a *Agent) watchRoutes(ctx context.Context) error {
	for ctx.Err() == nil {
		if err := a.routes.Watch(ctx, a.trigger.Fire); err != nil {
			a.log.Warn("watching routes: starting again", "error", err)
			select {
			case <-ctx.Done():
			case <-time.After(backoff):
			}
		}
	}
	return nil
}

func (a *Agent) close() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.dataplane != nil {
		if err := a.dataplane.Close(); err != nil {
			a.log.Error("close the dataplane", "error", err)
		}
	}
}

// work is one turn: read if files changed, plan, resolve, set, read back.
func (a *Agent) work(ctx context.Context) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	err := a.turn(ctx)
	if err != nil && ctx.Err() == nil {
		a.problem = err
		a.logOnce(slog.LevelError, err.Error())
	}
	return err
}

func (a *Agent) turn(ctx context.Context) error {
	if a.filesChange {
		if err := a.read(); err != nil {
			return err
		}
	}
	if a.dataplane == nil {
		return errors.New("no good configuration yet; see the findings")
	}
	want, err := a.desired()
	if err != nil {
		return err
	}
	before := a.programmed
	if before.IsZero() && a.census != nil && want.Plan.LoadBalancer {
		if err := a.dataplane.Prepare(want); err != nil {
			return err
		}
		a.mu.Unlock()
		a.firstCensus(ctx, a.dataplane, want.Plan)
		a.mu.Lock()
	}
	if err := a.dataplane.Set(ctx, want); err != nil {
		return err
	}
	if err := a.dataplane.Verify(want); err != nil {
		a.log.Warn("the maps differ from the plan though it was set: writing all of it again", "difference", err)
		a.dataplane.Doubt()
		if err := errors.Join(a.dataplane.Set(ctx, want), a.dataplane.Verify(want)); err != nil {
			return err
		}
	}
	a.problem, a.programmed = nil, time.Now()
	if len(want.Plan.NATAddresses) > 0 {
		if problem := portsOverlap(a.config.natPorts()); problem != "" {
			a.logOnce(slog.LevelWarn, problem)
		}
	}
	probes := a.probesHere(want.Plan, time.Now())
	a.probing = len(probes)
	a.health.Set(probes)
	a.health.Suspect(suspects(want.Plan.Probes, want.NextHops)...)
	if (want.Plan.Backend || len(want.Plan.NATAddresses) > 0) && time.Since(a.swept) >= resync {
		a.swept = time.Now()
		if _, err := a.dataplane.Sweep(); err != nil {
			a.logOnce(slog.LevelWarn, err.Error())
		}
	}
	if before.IsZero() {
		a.log.Info("forwarding", "frontends", len(want.Plan.Frontends), "pods", len(want.Plan.Pods))
	}
	return nil
}

// read takes the objects in. Any error among the findings leaves the last good
// plan in force.
func (a *Agent) read() error {
	snapshot, findings := file.Load(a.config.Sources)
	var next lb.Plan
	if !file.Failed(findings) {
		var more []lb.Finding
		next, more = plan.ForNode(snapshot, a.config.Node)
		findings = append(findings, more...)
	}
	a.findings, a.filesChange = findings, false
	for _, f := range findings {
		level := slog.LevelWarn
		if f.Severity == lb.Error {
			level = slog.LevelError
		}
		a.logOnce(level, f.Error())
	}
	if file.Failed(findings) {
		if a.dataplane == nil {
			return errors.New("the configuration has errors, and there is no earlier one")
		}
		a.log.Warn("the configuration has errors: the last good one stays in force")
		return nil
	}
	if a.dataplane == nil {
		if err := a.open(snapshot); err != nil {
			a.filesChange = true
			return err
		}
	}
	if !reflect.DeepEqual(next, a.plan) {
		a.plan, a.changed = next, time.Now()
		a.log.Info("plan", "frontends", len(next.Frontends), "pods", len(next.Pods))
		clear(a.logged)
	}
	return nil
}

func (a *Agent) open(snapshot lb.Snapshot) error {
	secret, tag, err := keys(a.config, snapshot)
	if err != nil {
		return err
	}
	c := a.config
	a.dataplane, err = dataplane.Open(dataplane.Config{Interfaces: c.Interfaces, PinDir: c.PinDir, Secret: secret, Tag: tag,
		VNI: c.Geneve.VNI, GenevePort: c.Geneve.Port, Limits: c.limits(), NATPorts: c.natPorts(), Census: a.census != nil, PureHash: c.PureHash, Generic: c.GenericXDP, Log: a.log,
		Timeouts: lb.Timeouts{TCP: c.Timeouts.TCP, UDP: c.Timeouts.UDP, Closing: c.Timeouts.Closing}})
	a.forwarding.Store(a.dataplane)
	return err
}

// desired adds to the plan what the kernel's tables say of the way.
func (a *Agent) desired() (dataplane.Desired, error) {
	want := dataplane.Desired{NextHops: map[netip.Addr]lb.NextHop{}}
	want.Plan, a.drainBy = drained(withDrains(a.plan, a.byHand), a.leaving, time.Now())
	var allOut []lb.FrontendID
	want.Plan, allOut = withHealth(want.Plan, a.verdicts())
	a.noteHealth(allOut)
	a.wanted = want.Plan
	a.unresolved = nil
	tried := map[netip.Addr]bool{}
	for _, f := range a.plan.Frontends {
		for _, b := range f.Backends {
			if tried[b.ID.Tunnel] || !b.ID.Tunnel.IsValid() {
				continue
			}
			tried[b.ID.Tunnel] = true
			hop, err := a.routes.Resolve(b.ID.Tunnel)
			if err != nil {
				a.unresolved = append(a.unresolved, err.Error())
				continue
			}
			want.NextHops[b.ID.Tunnel] = hop
		}
	}
	slices.Sort(a.unresolved)
	seen := map[int]bool{}
	for _, pod := range a.plan.Pods {
		if slices.Contains(pod.Serves, pod.Target) {
			continue // the server holds the VIP
		}
		index, err := a.routes.PodInterface(pod.Target.Addr())
		if err != nil {
			a.logOnce(slog.LevelWarn, fmt.Sprintf("Pod %s: %v", pod.Target, err))
			continue
		}
		if !seen[index] {
			seen[index] = true
			want.PodInterfaces = append(want.PodInterfaces, index)
		}
	}
	var err error
	want.MTU, err = leastMTU(a.config.Interfaces)
	return want, err
}

func leastMTU(interfaces []string) (int, error) {
	least := 0
	for _, name := range interfaces {
		device, err := netlink.LinkByName(name)
		if err != nil {
			return 0, fmt.Errorf("interfaces: %s: %w; name devices that exist", name, err)
		}
		if size := device.Attrs().MTU; least == 0 || size < least {
			least = size
		}
	}
	return least, nil
}

// portsOverlap says that sockets of this node may be given ports of mode NAT. No
// flow takes one from a socket, but it may have to look for another.
func portsOverlap(nat dataplane.PortRange) string {
	const path = "/proc/sys/net/ipv4/ip_local_port_range"
	var first, last uint16
	text, err := os.ReadFile(path)
	if err == nil {
		_, err = fmt.Sscan(string(text), &first, &last)
	}
	if err != nil || last < nat.First || first > nat.Last {
		return ""
	}
	return fmt.Sprintf("nat.ports: %d-%d overlaps net.ipv4.ip_local_port_range, %d-%d; change one of them", nat.First, nat.Last, first, last)
}

// logOnce logs what repeats itself once, until the plan changes.
func (a *Agent) logOnce(level slog.Level, message string) {
	if !a.logged[message] {
		a.logged[message] = true
		a.log.Log(context.Background(), level, message)
	}
}
