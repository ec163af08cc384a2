// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"fmt"
	"net/netip"
	"time"

	"fairlead.dev/fairlead/internal/lb"
)

// receiver makes the maps of role backend match a plan: which Pods are here
// and what they serve, and who may send tunnels. Flows of Pods that are gone
// are purged: nothing is delivered to whoever has their address next.
type receiver struct {
	maps  *contents
	limit int // of pods

	pods    map[bpfPodKey]bpfPod
	uids    map[bpfPodKey]string
	lbNodes map[bpfLbNodeKey]uint32
	cookies map[bpfPodKey]uint32 // thresholds
	purged  bool                 // flows of before the start, whose Pods are gone
}

// newReceiver adopts what the maps hold already.
func newReceiver(maps *contents, limits Limits) (*receiver, error) {
	pods, err := maps.pods.All()
	if err != nil {
		return nil, fmt.Errorf("read pods: %w", err)
	}
	lbNodes, err := maps.lbNodes.All()
	if err != nil {
		return nil, fmt.Errorf("read lb_nodes: %w", err)
	}
	return &receiver{maps: maps, limit: limits.Pods, pods: pods, uids: map[bpfPodKey]string{}, lbNodes: lbNodes, cookies: map[bpfPodKey]uint32{}}, nil
}

func (r *receiver) set(plan lb.Plan) error {
	pods, lbNodes, err := r.wanted(plan)
	if err != nil {
		return err
	}
	if err := difference(r.lbNodes, lbNodes, r.maps.lbNodes); err != nil {
		return fmt.Errorf("program lb_nodes: %w", err)
	}
	gone := map[bpfPodKey]bool{}
	for key := range r.pods {
		if _, ok := pods[key]; !ok {
			gone[key] = true
		}
	}
	for _, pod := range plan.Pods {
		key := podKey(pod)
		if old := r.uids[key]; old != "" && old != pod.UID {
			gone[key] = true // another Pod has the address now
		}
	}
	if err := difference(r.pods, pods, r.maps.pods); err != nil {
		return fmt.Errorf("program pods: %w", err)
	}
	if err := r.purge(gone); err != nil {
		return err
	}
	if err := r.setCookies(plan); err != nil {
		return fmt.Errorf("program floods: %w", err)
	}
	clear(r.uids)
	for _, pod := range plan.Pods {
		r.uids[podKey(pod)] = pod.UID
	}
	return nil
}

// setCookies says which Pods' SYNs are counted. What is being counted stays.
func (r *receiver) setCookies(plan lb.Plan) error {
	wanted := map[bpfPodKey]bool{}
	for _, pod := range plan.Pods {
		key := podKey(pod)
		if pod.CookiesFrom == 0 {
			continue
		}
		wanted[key] = true
		if r.cookies[key] == pod.CookiesFrom {
			continue
		}
		if err := r.maps.floods.Put(key, bpfFlood{Threshold: uint64(pod.CookiesFrom)}); err != nil {
			return err
		}
		r.cookies[key] = pod.CookiesFrom
	}
	for key := range r.cookies {
		if wanted[key] {
			continue
		}
		if err := r.maps.floods.Delete(key); err != nil {
			return err
		}
		delete(r.cookies, key)
	}
	return nil
}

// purge removes the flows of Pods that are gone, and the first time those of
// all that are not there.
func (r *receiver) purge(gone map[bpfPodKey]bool) error {
	if r.purged && len(gone) == 0 || r.maps.purge == nil {
		return nil
	}
	err := r.maps.purge(func(key bpfPodKey) bool {
		_, there := r.pods[key]
		return gone[key] || !there
	})
	if err != nil {
		return fmt.Errorf("purge the flows of Pods that are gone: %w", err)
	}
	r.purged = true
	return nil
}

// affinityCoarse is where seconds become units of four, see struct vip_port.
const affinityCoarse = 0x8000

func affinityCode(d time.Duration) uint16 {
	seconds := (d + time.Second - 1) / time.Second
	if seconds < affinityCoarse {
		return uint16(seconds)
	}
	return affinityCoarse + uint16(min((seconds+3)/4, affinityCoarse-1))
}

// lasts is its inverse.
func lasts(code uint16) time.Duration {
	if code < affinityCoarse {
		return time.Duration(code) * time.Second
	}
	return 4 * time.Duration(code-affinityCoarse) * time.Second
}

func podKey(p lb.Pod) bpfPodKey {
	return bpfPodKey{Address: bpfAddrOf(p.Target.Addr()), Port: swap16(p.Target.Port()), Proto: uint8(p.Protocol)}
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
			if len(pod.Affinity) > 0 {
				value.Serves[i].Affinity = affinityCode(pod.Affinity[i])
			}
		}
		pods[podKey(pod)] = value
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
