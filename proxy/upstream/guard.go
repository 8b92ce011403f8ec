package upstream

import (
	"net/netip"
	"strconv"
	"strings"
)

// refusedNets are the parts of the public-looking address space that are not public, or that carry
// an IPv4 address of somebody's choice (IANA special-purpose address registries).
var refusedNets = [...]netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"),        // "this host": Linux connects to itself
	netip.MustParsePrefix("10.0.0.0/8"),       // private
	netip.MustParsePrefix("100.64.0.0/10"),    // carrier-grade NAT; Alibaba's metadata service
	netip.MustParsePrefix("127.0.0.0/8"),      // loopback
	netip.MustParsePrefix("168.63.129.16/32"), // Azure's host agent, on a public address
	netip.MustParsePrefix("169.254.0.0/16"),   // link-local; most clouds' metadata services
	netip.MustParsePrefix("172.16.0.0/12"),    // private
	netip.MustParsePrefix("192.0.0.0/24"),     // protocol assignments; Oracle's metadata service
	netip.MustParsePrefix("192.88.99.0/24"),   // 6to4 relays
	netip.MustParsePrefix("192.168.0.0/16"),   // private
	netip.MustParsePrefix("198.18.0.0/15"),    // benchmarks
	netip.MustParsePrefix("224.0.0.0/4"),      // multicast
	netip.MustParsePrefix("240.0.0.0/4"),      // reserved, and broadcast
	netip.MustParsePrefix("2001::/23"),        // protocol assignments: Teredo, benchmarks, ORCHID
	netip.MustParsePrefix("2002::/16"),        // 6to4
}

var (
	globalUnicast = netip.MustParsePrefix("2000::/3")     // all of IPv6 that is handed out to hosts
	nat64         = netip.MustParsePrefix("64:ff9b::/96") // an IPv4 address in the last 32 bits (RFC 6052)
)

// isPublic reports whether ip is an address of the Internet at large. What embeds an IPv4 address is
// as public as that; forms that no registry lives at are not public at all.
func isPublic(ip netip.Addr) bool {
	ip = ip.Unmap()
	if nat64.Contains(ip) {
		b := ip.As16()
		ip = netip.AddrFrom4([4]byte(b[12:]))
	}
	if !ip.Is4() && !globalUnicast.Contains(ip) {
		return false // loopback, link-local, unique local, multicast, other mappings, all that has a zone
	}
	for _, net := range refusedNets {
		if net.Contains(ip) {
			return false
		}
	}
	return true
}

// isName reports whether host is a name to look up. A name whose last label is a number is not:
// resolvers read 127.1, 2130706433 and 0x7f000001 as addresses (WHATWG URL, "ends in a number").
func isName(host string) bool {
	host = strings.TrimSuffix(host, ".")
	if host == "" || len(host) > 253 {
		return false
	}
	for label := range strings.SplitSeq(host, ".") {
		if label == "" || len(label) > 63 || strings.Trim(label, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_") != "" {
			return false
		}
	}
	last := strings.ToLower(host[strings.LastIndex(host, ".")+1:])
	if digits, hex := strings.CutPrefix(last, "0x"); hex {
		return strings.Trim(digits, "0123456789abcdef") != ""
	}
	return strings.Trim(last, "0123456789") != ""
}

// isPort reports whether p is the number of a TCP port: a service's name would be looked up.
func isPort(p string) bool {
	n, err := strconv.ParseUint(p, 10, 16)
	return err == nil && n > 0
}
