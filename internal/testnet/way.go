// SPDX-License-Identifier: Apache-2.0

package testnet

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Attributes of a question for a route that the netlink package does not know.
const (
	rtaProtocol = 27
	rtaSport    = 28
	rtaDport    = 29
)

// Way returns the LB node that the router sends a TCP flow of the client to,
// as its routes are now.
func (n *Network) Way(client, vip netip.AddrPort) (*Node, error) {
	family, length := unix.AF_INET6, uint8(128)
	if vip.Addr().Is4() {
		family, length = unix.AF_INET, 32
	}
	device, err := n.Router.Device("to-client")
	if err != nil {
		return nil, err
	}
	port := func(v uint16) []byte { return binary.BigEndian.AppendUint16(nil, v) }
	request := nl.NewNetlinkRequest(unix.RTM_GETROUTE, 0)
	request.AddData(&nl.RtMsg{RtMsg: unix.RtMsg{Family: uint8(family), Dst_len: length, Src_len: length}})
	for _, attribute := range []*nl.RtAttr{
		nl.NewRtAttr(unix.RTA_DST, vip.Addr().AsSlice()), nl.NewRtAttr(unix.RTA_SRC, client.Addr().AsSlice()),
		nl.NewRtAttr(unix.RTA_IIF, nl.Uint32Attr(uint32(device))), nl.NewRtAttr(rtaProtocol, []byte{unix.IPPROTO_TCP}),
		nl.NewRtAttr(rtaSport, port(client.Port())), nl.NewRtAttr(rtaDport, port(vip.Port())),
	} {
		request.AddData(attribute)
	}
	var gateway netip.Addr
	err = n.Router.Do(func() error {
		replies, err := request.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWROUTE)
		if err != nil {
			return err
		}
		for _, reply := range replies {
			attributes, err := nl.ParseRouteAttr(reply[unix.SizeofRtMsg:])
			if err != nil {
				return err
			}
			for _, a := range attributes {
				if a.Attr.Type == unix.RTA_GATEWAY {
					gateway, _ = netip.AddrFromSlice(a.Value)
				}
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("ask the router for the way of %s: %w", client, err)
	}
	for _, node := range n.LoadBalancers() {
		if gateway == node.Address4 || gateway == node.Address6 {
			return node, nil
		}
	}
	return nil, fmt.Errorf("ask the router for the way of %s: it leads to %s, which is no LB node", client, gateway)
}
