// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"fmt"
	"net/netip"
	"time"

	"fairlead.dev/fairlead/internal/lb"
)

// receiver makes the maps of role backend match a plan: which Pods are here
// and what they serve, and who may send tunnels.
type receiver struct {
	maps  *contents
	limit int           // of pods
	keep  time.Duration // a Pod that left the plan, for the flows it still has

	pods    map[bpfPodKey]bpfPod
	leaving map[bpfPodKey]time.Time
	lbNodes map[bpfLbNodeKey]uint32
}

// newReceiver adopts what the maps hold already.
func newReceiver(maps *contents, limits Limits, keep time.Duration, now time.Time) (*receiver, error) {
	pods, err := maps.pods.All()
	if err != nil {
		return nil, fmt.Errorf("read pods: %w", err)
	}
	lbNodes, err := maps.lbNodes.All()
	if err != nil {
		return nil, fmt.Errorf("read lb_nodes: %w", err)
	}
	r := &receiver{maps: maps, limit: limits.Pods, keep: keep, pods: pods, leaving: map[bpfPodKey]time.Time{}, lbNodes: lbNodes}
	for key := range pods {
		r.leaving[key] = now
	}
	return r, nil
}

func (r *receiver) set(plan lb.Plan, now time.Time) error {
	pods, lbNodes, err := r.wanted(plan)
	if err != nil {
		return err
	}
	if err := difference(r.lbNodes, lbNodes, r.maps.lbNodes); err != nil {
		return fmt.Errorf("program lb_nodes: %w", err)
	}
	for key, value := range pods {
		delete(r.leaving, key)
		if known, ok := r.pods[key]; ok && known == value {
			continue
		}
		if err := r.maps.pods.Put(key, value); err != nil {
			return fmt.Errorf("program Pod %s: %w", addrOf(key.Address), err)
		}
		r.pods[key] = value
	}
	return r.expire(pods, now)
}

// wanted turns the plan into map contents, and refuses what does not fit.
func (r *receiver) wanted(plan lb.Plan) (map[bpfPodKey]bpfPod, map[bpfLbNodeKey]uint32, error) {
	if len(plan.Pods) > r.limit {
		return nil, nil, fmt.Errorf("the plan of node %s has %d Pods' ports and there is room for %d; raise limits.pods in the agent's configuration and restart it",
			plan.Node, len(plan.Pods), r.limit)
	}
	pods := make(map[bpfPodKey]bpfPod, len(plan.Pods))
	for _, pod := range plan.Pods {
		if len(pod.Serves) > podServesMax {
			return nil, nil, fmt.Errorf("refuse Service %s: Pod %s serves %d VIPs and ports, and %d is the most; give it more container ports, or fewer Services",
				pod.Service, pod.Target, len(pod.Serves), podServesMax)
		}
		if why := lb.Unusable(pod.Target.Addr()); why != "" {
			return nil, nil, fmt.Errorf("refuse Service %s: Pod %s: %s; correct the EndpointSlice", pod.Service, pod.Target, why)
		}
		value := bpfPod{Count: uint32(len(pod.Serves))}
		for i, vip := range pod.Serves {
			value.Serves[i] = bpfVipPort{Vip: bpfAddrOf(vip.Addr()), Port: swap16(vip.Port())}
		}
		pods[bpfPodKey{Address: bpfAddrOf(pod.Target.Addr()), Port: swap16(pod.Target.Port()), Proto: uint8(pod.Protocol)}] = value
	}
	lbNodes := make(map[bpfLbNodeKey]uint32, len(plan.LBNodes))
	for i, node := range plan.LBNodes {
		lbNodes[lbNodeKey(node.Prefix)] = uint32(i)
	}
	return pods, lbNodes, nil
}

func lbNodeKey(p netip.Prefix) bpfLbNodeKey {
	length := p.Bits()
	if p.Addr().Is4() {
		length += 96
	}
	return bpfLbNodeKey{PrefixLen: uint32(length), Address: bpfAddrOf(p.Masked().Addr())}
}

// expire removes the Pods that left the plan long enough ago that none of
// their flows can be alive; earlier, when there is no room for them.
func (r *receiver) expire(wanted map[bpfPodKey]bpfPod, now time.Time) error {
	for key := range r.pods {
		if _, ok := wanted[key]; ok {
			continue
		}
		since, ok := r.leaving[key]
		if !ok {
			r.leaving[key], since = now, now
		}
		if now.Sub(since) < r.keep && len(r.pods) <= r.limit {
			continue
		}
		if err := r.maps.pods.Delete(key); err != nil {
			return fmt.Errorf("remove Pod %s: %w", addrOf(key.Address), err)
		}
		delete(r.pods, key)
		delete(r.leaving, key)
	}
	return nil
}

// difference makes a map equal to want: it adds before it deletes, and keeps
// known in step.
func difference[K comparable, V comparable](known, want map[K]V, m hashMap[K, V]) error {
	for key, value := range want {
		if old, ok := known[key]; ok && old == value {
			continue
		}
		if err := m.Put(key, value); err != nil {
			return err
		}
		known[key] = value
	}
	for key := range known {
		if _, ok := want[key]; ok {
			continue
		}
		if err := m.Delete(key); err != nil {
			return err
		}
		delete(known, key)
	}
	return nil
}
