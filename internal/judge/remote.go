package judge

import (
	"net/netip"
	"strings"

	"castellan.dev/authz"
)

// maxForwarded bounds the addresses of X-Forwarded-For that are looked at.
const maxForwarded = 64

// RemoteIP is the original client's address: what the trusted proxy farthest
// from us wrote, trusted addresses from the end of X-Forwarded-For. The zero
// value, meaning the packet's source, where none is trusted, and where the list
// is too short or malformed: then it was not written by those proxies.
func RemoteIP(h authz.Header, trusted int) netip.Addr {
	if trusted <= 0 || trusted > maxForwarded {
		return netip.Addr{}
	}
	values := h.Values("x-forwarded-for")
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
	// Told by its shape: a failed attempt would cost an allocation per request.
	if strings.Count(s, ":") == 1 || strings.Contains(s, "]:") {
		ap, err := netip.ParseAddrPort(s)
		if err != nil {
			return netip.Addr{}
		}
		return ap.Addr().Unmap().WithZone("")
	}
	s = strings.TrimSuffix(strings.TrimPrefix(s, "["), "]")
	addr, err := netip.ParseAddr(s)
	if err != nil {
		return netip.Addr{}
	}
	return addr.Unmap().WithZone("")
}

// Protocol is how a port is read, by its declaration.
type Protocol uint8

// Protocols. The zero value is told apart by the first bytes.
const (
	Undeclared Protocol = iota
	HTTP
	// HTTP2 is gRPC and declared HTTP/2.
	HTTP2
	TCP
)

// ProtocolOf reads a declared protocol. What is not HTTP in the clear is opaque
// bytes, of which policy sees the connection only.
func ProtocolOf(declared string) Protocol {
	switch declared {
	case "":
		return Undeclared
	case "http", "http1", "http/1.1":
		return HTTP
	case "http2", "h2c", "grpc", "grpc-web":
		return HTTP2
	default:
		return TCP
	}
}
