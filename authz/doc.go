// Package authz decides who may do what: it compiles AuthorizationPolicy,
// RequestAuthentication and PeerAuthentication documents for one workload into
// an immutable Snapshot and answers from it.
//
//	snapshot, problems := authz.Compile(authz.Config{Documents: docs, Workload: w, Mesh: mesh})
//	conn := snapshot.Connect(peer)     // once per connection
//	decision := conn.Authorize(&req)   // once per request, or conn.AuthorizeTCP()
//
// It decides as the users of security.istio.io/v1 know it: CUSTOM, then DENY,
// then ALLOW; no ALLOW policy means allow. Where what it is given cannot be
// represented it fails closed: an ALLOW rule never matches, a DENY or CUSTOM rule
// loses the condition and so matches more, and Compile reports a Problem. A nil
// Snapshot, and one compiled with DenyAll, denies everything.
//
// It refuses nothing by panicking or by an error at request time, and does no
// I/O, reads no clock and starts no goroutine. It assumes that the caller has
// authenticated what it passes on: Peer.ID from a verified chain, Request.Claims
// from a verified token, Request.Path normalised by NormalizePath and forwarded
// as it was judged.
package authz
