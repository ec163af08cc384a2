// SPDX-License-Identifier: Apache-2.0

// Package status says what a node wanted, did and failed to do: as a JSON
// document, as tables and as metrics.
package status

import (
	"time"

	"fairlead.dev/fairlead/internal/lb"
)

// Document is the status of one node.
type Document struct {
	Node         string    `json:"node"`
	Version      string    `json:"version"`
	Roles        []string  `json:"roles"`
	Since        time.Time `json:"since"` // start of the agent
	Now          time.Time `json:"now"`
	Programmed   bool      `json:"programmed"`            // the maps held the plan when they were last read
	ProgrammedAt time.Time `json:"programmedAt,omitzero"` // when they last did
	ChangedAt    time.Time `json:"changedAt,omitzero"`    // when the plan last changed
	Problem      string    `json:"problem,omitempty"`     // why they do not

	Attachments []Attachment `json:"attachments"`
	Services    []Service    `json:"services"`
	Pods        []Pod        `json:"pods,omitempty"`
	Drops       []Count      `json:"drops"`  // those above 0
	Events      []Count      `json:"events"` // those above 0
	Capacity    []Capacity   `json:"capacity"`
	Findings    []lb.Finding `json:"findings,omitempty"`
	Unresolved  []string     `json:"unresolved,omitempty"` // next hops, and why
}

// Attachment is a program on a device.
type Attachment struct {
	Interface string `json:"interface"`
	Mode      string `json:"mode"`
}

// Counter is what was forwarded.
type Counter struct {
	Packets     uint64 `json:"packets"`
	Bytes       uint64 `json:"bytes"`
	Connections uint64 `json:"connections"` // TCP SYNs
}

// Service is one VIP, port and protocol of a Service.
type Service struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	PortName  string `json:"portName,omitempty"`
	VIP       string `json:"vip"`
	Port      uint16 `json:"port"`
	Protocol  string `json:"protocol"`
	Slots     uint32 `json:"slots"`
	Contested int    `json:"contested"` // slots of which others than their backend may own flows
	// When its backends last changed, and the share of the flow hashes that moved
	// to another one then.
	ChangedAt time.Time `json:"changedAt,omitzero"`
	Moved     float64   `json:"moved"`
	// Imbalance is the largest share of the slots that a backend has, as a multiple
	// of what its weight asks for: 1 is perfect.
	Imbalance float64 `json:"imbalance"`
	Problem   string  `json:"problem,omitempty"` // of its backends all together
	Keeps     string  `json:"keeps,omitempty"`   // what its flows outlive, by its mode
	Counter
	Backends []Backend `json:"backends"`
}

// Backend is one backend of a service. Its counters are over all services.
type Backend struct {
	Address    string  `json:"address"`
	Node       string  `json:"node,omitempty"`
	Mode       string  `json:"mode"`
	Tunnel     string  `json:"tunnel,omitempty"`
	Wanted     string  `json:"wanted"` // state in the plan
	State      string  `json:"state"`  // state in the maps
	Slots      uint32  `json:"slots"`
	Share      float64 `json:"share"`       // of the slots, in the maps
	WantedPart float64 `json:"wantedShare"` // by weight
	// Of a backend that takes no new flows: since when, and how many it still has,
	// as its node last said.
	LeavingSince time.Time `json:"leavingSince,omitzero"`
	Flows        *uint32   `json:"flows,omitempty"`
	// What its health check last said: "passes", or why it fails; and when, after
	// so many seconds.
	Check     string    `json:"check,omitempty"`
	CheckedAt time.Time `json:"checkedAt,omitzero"`
	CheckTime float64   `json:"checkSeconds,omitempty"`
	NextHop   string    `json:"nextHop"` // "resolved", "kernel" (each packet asks the FIB) or "local"
	Counter
}

// Pod is an address and port of this node, and what it serves.
type Pod struct {
	Address  string   `json:"address"`
	Protocol string   `json:"protocol"`
	Serves   []string `json:"serves"`
}

// Count is a named counter.
type Count struct {
	Name  string `json:"name"`
	Count uint64 `json:"count"`
}

// Capacity is how full a map is; Used is -1 where counting costs too much.
type Capacity struct {
	Map  string `json:"map"`
	Used int    `json:"used"`
	Max  int    `json:"max"`
}
