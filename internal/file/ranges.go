// SPDX-License-Identifier: Apache-2.0

package file

import (
	"fmt"
	"net/netip"
	"strings"
)

// parseRange reads a prefix, a range with both ends, or one address, as the
// fewest prefixes.
func parseRange(text string) ([]netip.Prefix, error) {
	if first, last, ok := strings.Cut(text, "-"); ok {
		from, err1 := netip.ParseAddr(strings.TrimSpace(first))
		to, err2 := netip.ParseAddr(strings.TrimSpace(last))
		if err1 != nil || err2 != nil || from.Is4() != to.Is4() || to.Less(from) || from.Is4In6() || to.Is4In6() || from.Zone() != "" || to.Zone() != "" {
			return nil, fmt.Errorf("%q is not a range of addresses", text)
		}
		return prefixesOf(from, to), nil
	}
	if p, err := netip.ParsePrefix(text); err == nil && !p.Addr().Is4In6() {
		if p != p.Masked() {
			return nil, fmt.Errorf("%s has bits set behind its length; %s has not", text, p.Masked())
		}
		return []netip.Prefix{p}, nil
	}
	addr, err := netip.ParseAddr(text)
	if err != nil || addr.Is4In6() || addr.Zone() != "" {
		return nil, fmt.Errorf("%q is neither prefix, range nor address", text)
	}
	return []netip.Prefix{netip.PrefixFrom(addr, addr.BitLen())}, nil
}

// prefixesOf covers from..to: each time the largest prefix that starts there.
func prefixesOf(from, to netip.Addr) []netip.Prefix {
	var all []netip.Prefix
	for {
		p := netip.PrefixFrom(from, from.BitLen())
		for p.Bits() > 0 {
			wider := netip.PrefixFrom(from, p.Bits()-1)
			if wider.Masked().Addr() != from || to.Less(last(wider)) {
				break
			}
			p = wider
		}
		all = append(all, p)
		end := last(p)
		if end == to {
			return all
		}
		from = end.Next()
	}
}

func last(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	addr, _ := netip.AddrFromSlice(b)
	return addr
}
