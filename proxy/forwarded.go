package proxy

import (
	"net/netip"
	"strings"

	"castellan.dev/internal/tlsconf"
	"castellan.dev/proxy/engine"
)

// forwardedClientCert tells the application who called, in Envoy's format:
// By is ourselves, Hash the caller's leaf, URI its SPIFFE ID. Neither ID can hold
// a character that the format would want quoted.
func forwardedClientCert(own string, peer tlsconf.Peer) string {
	return "By=" + own + ";Hash=" + peer.LeafSHA256 + ";URI=" + peer.ID.String()
}

// maxForwarded bounds the addresses of X-Forwarded-For that are looked at.
const maxForwarded = 64

// remoteIP is the original client's address: what the trusted proxy farthest
// from us wrote, trusted addresses from the end of X-Forwarded-For. The zero
// value, meaning the packet's source, where none is trusted, and where the list
// is too short or malformed: then it was not written by those proxies.
func remoteIP(r *engine.Request, trusted int) netip.Addr {
	if trusted <= 0 || trusted > maxForwarded {
		return netip.Addr{}
	}
	values := r.Values("x-forwarded-for")
	for i := len(values) - 1; i >= 0; i-- {
		rest := values[i]
		for {
			at := strings.LastIndexByte(rest, ',')
			if trusted--; trusted == 0 {
				return parseForwarded(rest[at+1:])
			}
			if at < 0 {
				break
			}
			rest = rest[:at]
		}
	}
	return netip.Addr{}
}

func parseForwarded(s string) netip.Addr {
	s = strings.Trim(s, " \t")
	if ap, err := netip.ParseAddrPort(s); err == nil {
		return ap.Addr().Unmap().WithZone("")
	}
	s = strings.TrimSuffix(strings.TrimPrefix(s, "["), "]")
	addr, err := netip.ParseAddr(s)
	if err != nil {
		return netip.Addr{}
	}
	return addr.Unmap().WithZone("")
}
