package jws

import (
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"slices"
	"syscall"
)

// ErrBlocked says that the guard refused an address or a URL.
var ErrBlocked = errors.New("blocked")

// guard keeps fetches from being turned against what only we can reach (SSRF).
// It judges the address that is dialled, after DNS, so that a name cannot hide it.
type guard struct {
	http     bool
	prefixes []netip.Prefix
}

// newGuard reads policy.JWKSFetch.Allow.
func newGuard(allow []string) (*guard, error) {
	g := &guard{}
	for i, a := range allow {
		if a == "http" {
			g.http = true
			continue
		}
		p, err := netip.ParsePrefix(a)
		if addr, aerr := netip.ParseAddr(a); aerr == nil {
			p, err = addr.Prefix(addr.BitLen())
		}
		if err != nil {
			return nil, fmt.Errorf("jws: allow[%d]: %q is neither a address range (CIDR) nor \"http\"", i, a)
		}
		g.prefixes = append(g.prefixes, p.Masked())
	}
	return g, nil
}

// checkURL refuses what is not https (or allowed http) with a host and nothing secret.
func (g *guard) checkURL(raw string) error {
	u, err := url.Parse(raw)
	switch {
	case err != nil:
		return fmt.Errorf("%w: %q is not a URL", ErrBlocked, clip(raw))
	case u.Scheme == "http" && !g.http:
		return fmt.Errorf("%w: %q is plain http; use https, or add \"http\" to jwks.allow", ErrBlocked, clip(raw))
	case u.Scheme != "https" && u.Scheme != "http":
		return fmt.Errorf("%w: %q: https is wanted", ErrBlocked, clip(raw))
	case u.Hostname() == "":
		return fmt.Errorf("%w: %q has no host", ErrBlocked, clip(raw))
	case u.User != nil:
		return fmt.Errorf("%w: %q has user information in it", ErrBlocked, u.Redacted())
	}
	return nil
}

// control is a net.Dialer's Control: address is the one about to be connected to.
func (g *guard) control(_, address string, _ syscall.RawConn) error {
	ap, err := netip.ParseAddrPort(address)
	if err != nil {
		return fmt.Errorf("%w: %q is no address", ErrBlocked, address)
	}
	return g.checkAddr(ap.Addr())
}

func (g *guard) checkAddr(addr netip.Addr) error {
	a := embedded(addr.WithZone(""))
	if !a.IsValid() || a.IsUnspecified() || a.IsMulticast() || a.IsLinkLocalUnicast() || inAny(alwaysBlocked(), a) {
		return fmt.Errorf("%w: %s is a link-local, metadata or otherwise special address, which no setting allows", ErrBlocked, addr)
	}
	if a.IsLoopback() || a.IsPrivate() || inAny(nonPublic(), a) {
		if inAny(g.prefixes, a) {
			return nil
		}
		return fmt.Errorf("%w: %s is not a public address; add its range to jwks.allow if it is meant", ErrBlocked, addr)
	}
	return nil
}

// embedded unwraps an IPv4 address inside an IPv6 one (mapped, NAT64, 6to4), so
// that none of those forms gets around the guard.
func embedded(a netip.Addr) netip.Addr {
	a = a.Unmap()
	if !a.Is6() {
		return a
	}
	b := a.As16()
	switch {
	case inAny([]netip.Prefix{netip.MustParsePrefix("64:ff9b::/96"), netip.MustParsePrefix("::/96")}, a) && !a.IsLoopback() && !a.IsUnspecified():
		return netip.AddrFrom4([4]byte(b[12:16]))
	case inAny([]netip.Prefix{netip.MustParsePrefix("2002::/16")}, a):
		return netip.AddrFrom4([4]byte(b[2:6]))
	}
	return a
}

// alwaysBlocked are the metadata services of clouds that are not link-local, and
// addresses that are no host's.
func alwaysBlocked() []netip.Prefix {
	return []netip.Prefix{
		netip.MustParsePrefix("0.0.0.0/8"),
		netip.MustParsePrefix("100.100.100.200/32"), // Alibaba Cloud
		netip.MustParsePrefix("168.63.129.16/32"),   // Azure
		netip.MustParsePrefix("192.0.0.0/24"),       // IETF; Oracle's metadata is 192.0.0.192
		netip.MustParsePrefix("240.0.0.0/4"),
		netip.MustParsePrefix("fd00:ec2::254/128"), // AWS
		netip.MustParsePrefix("fd20:ce::254/128"),  // Google
	}
}

// nonPublic are ranges beside RFC 1918 and RFC 4193 that the world does not route.
func nonPublic() []netip.Prefix {
	return []netip.Prefix{
		netip.MustParsePrefix("100.64.0.0/10"), // carriers' NAT
		netip.MustParsePrefix("198.18.0.0/15"), // benchmarks
		netip.MustParsePrefix("192.0.2.0/24"),  // documentation, as the next three
		netip.MustParsePrefix("198.51.100.0/24"),
		netip.MustParsePrefix("203.0.113.0/24"),
		netip.MustParsePrefix("2001:db8::/32"),
		netip.MustParsePrefix("64:ff9b:1::/48"), // local NAT64
		netip.MustParsePrefix("fec0::/10"),      // old site-local
	}
}

func inAny(prefixes []netip.Prefix, a netip.Addr) bool {
	return slices.ContainsFunc(prefixes, func(p netip.Prefix) bool { return p.Contains(a) })
}
