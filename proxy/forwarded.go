package proxy

import "castellan.dev/internal/tlsconf"

// forwardedClientCert tells the application who called, in Envoy's format:
// By is ourselves, Hash the caller's leaf, URI its SPIFFE ID. Neither ID can hold
// a character that the format would want quoted.
func forwardedClientCert(own string, peer tlsconf.Peer) string {
	return "By=" + own + ";Hash=" + peer.LeafSHA256 + ";URI=" + peer.ID.String()
}
