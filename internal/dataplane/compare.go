// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"cmp"

	"fairlead.dev/fairlead/internal/lb"
)

// The orders that states and dumps are written in.

func compareBackends(a, b lb.BackendID) int {
	return cmp.Or(a.Target.Compare(b.Target), a.Tunnel.Compare(b.Tunnel), cmp.Compare(a.Mode, b.Mode),
		cmp.Compare(a.UID, b.UID), a.Local.Compare(b.Local))
}

func compareFrontends(a, b lb.FrontendID) int {
	return cmp.Or(a.VIP.Compare(b.VIP), cmp.Compare(a.Port, b.Port), cmp.Compare(a.Protocol, b.Protocol))
}
