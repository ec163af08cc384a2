// SPDX-License-Identifier: Apache-2.0

package status

import (
	"strconv"

	"github.com/prometheus/client_golang/prometheus"
)

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("fairlead_"+name, help, labels, nil)
}

var (
	programmed         = desc("dataplane_programmed", "1 when the maps hold the plan.")
	servicePackets     = desc("service_packets_total", "Packets forwarded.", "namespace", "service", "vip", "port", "protocol")
	serviceBytes       = desc("service_bytes_total", "L3 bytes forwarded, as clients sent them.", "namespace", "service", "vip", "port", "protocol")
	serviceConnections = desc("service_connections_total", "TCP SYNs forwarded.", "namespace", "service", "vip", "port", "protocol")
	serviceBackends    = desc("service_backends", "Backends by state.", "namespace", "service", "vip", "port", "protocol", "state")
	serviceContested   = desc("service_contested_slots", "Slots of which others than their backend may own flows.", "namespace", "service", "vip", "port", "protocol")
	serviceImbalance   = desc("service_imbalance", "Largest share of the slots that a backend has, as a multiple of what its weight asks for.", "namespace", "service", "vip", "port", "protocol")
	serviceFailing     = desc("service_failing_checks", "Backends whose last health check failed.", "namespace", "service", "vip", "port", "protocol")
	backendFlows       = desc("leaving_backend_flows", "Flows that a backend which takes no new ones still has, as its node last said.", "namespace", "service", "vip", "port", "protocol", "backend")
	dropped            = desc("dropped_packets_total", "Packets dropped, by reason.", "reason")
	events             = desc("events_total", "What happened that is no drop.", "event")
	capacityUsed       = desc("map_entries", "Entries in use.", "map")
	capacityMax        = desc("map_entries_max", "Entries that there is room for.", "map")
	findings           = desc("findings", "Findings of the configuration in force, by severity.", "severity")
)

// Collector makes metrics of documents.
type Collector struct {
	// Read returns the document of now.
	Read func() Document
}

// Describe leaves the collector unchecked: labels come and go with services.
func (c Collector) Describe(chan<- *prometheus.Desc) {}

// Collect reads one document for all metrics of a scrape.
func (c Collector) Collect(to chan<- prometheus.Metric) {
	d := c.Read()
	send := func(desc *prometheus.Desc, kind prometheus.ValueType, value float64, labels ...string) {
		to <- prometheus.MustNewConstMetric(desc, kind, value, labels...)
	}
	held := 0.0
	if d.Programmed {
		held = 1
	}
	send(programmed, prometheus.GaugeValue, held)
	for _, s := range d.Services {
		labels := []string{s.Namespace, s.Name, s.VIP, strconv.Itoa(int(s.Port)), s.Protocol}
		send(servicePackets, prometheus.CounterValue, float64(s.Packets), labels...)
		send(serviceBytes, prometheus.CounterValue, float64(s.Bytes), labels...)
		send(serviceConnections, prometheus.CounterValue, float64(s.Connections), labels...)
		send(serviceContested, prometheus.GaugeValue, float64(s.Contested), labels...)
		send(serviceImbalance, prometheus.GaugeValue, s.Imbalance, labels...)
		states, failing := map[string]int{}, 0
		for _, b := range s.Backends {
			if b.Check != "" && b.Check != "passes" {
				failing++
			}
			states[b.State]++
			if b.Flows != nil {
				send(backendFlows, prometheus.GaugeValue, float64(*b.Flows), append(labels[:5:5], b.Address)...)
			}
		}
		send(serviceFailing, prometheus.GaugeValue, float64(failing), labels...)
		for state, n := range states {
			send(serviceBackends, prometheus.GaugeValue, float64(n), append(labels[:5:5], state)...)
		}
	}
	for _, count := range d.Drops {
		send(dropped, prometheus.CounterValue, float64(count.Count), count.Name)
	}
	for _, count := range d.Events {
		send(events, prometheus.CounterValue, float64(count.Count), count.Name)
	}
	for _, m := range d.Capacity {
		send(capacityMax, prometheus.GaugeValue, float64(m.Max), m.Map)
		if m.Used >= 0 {
			send(capacityUsed, prometheus.GaugeValue, float64(m.Used), m.Map)
		}
	}
	severities := map[string]int{"error": 0, "warning": 0}
	for _, f := range d.Findings {
		severities[string(f.Severity)]++
	}
	for severity, n := range severities {
		send(findings, prometheus.GaugeValue, float64(n), severity)
	}
}
