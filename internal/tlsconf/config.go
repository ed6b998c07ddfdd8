package tlsconf

import (
	"crypto/tls"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Certificate returns the certificate to present now. It is asked at every
// handshake, so a renewed one serves new connections and touches no live one.
type Certificate func() (*tls.Certificate, error)

// ServerOptions are what servers differ in; the zero value asks everyone for a
// certificate of the mesh and negotiates no protocol.
type ServerOptions struct {
	NextProtos []string
	// InsecureOptionalClient admits callers without a certificate, or with one
	// that is not accepted (an agent whose certificate expired must be able to
	// ask for another). Whoever sets it calls Verifier.Peer for each method that
	// wants to know the caller.
	InsecureOptionalClient bool
}

// ServerConfig returns the configuration of a server of the mesh: TLS 1.3 only,
// no session tickets, the client judged by v in VerifyConnection.
func ServerConfig(cert Certificate, v *Verifier, opts ServerOptions) *tls.Config {
	cfg := &tls.Config{
		MinVersion:             tls.VersionTLS13,
		SessionTicketsDisabled: true,
		NextProtos:             opts.NextProtos,
		Time:                   v.now,
		GetCertificate:         func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return current(cert, v.now) },
	}
	if opts.InsecureOptionalClient {
		cfg.ClientAuth = tls.RequestClientCert
		return cfg
	}
	cfg.ClientAuth = tls.RequireAnyClientCert
	cfg.VerifyConnection = func(cs tls.ConnectionState) error {
		_, err := v.Peer(cs)
		return err
	}
	return cfg
}

// ClientOptions are what clients differ in.
type ClientOptions struct {
	// ServerName is sent as SNI; nothing is checked against it.
	ServerName string
	NextProtos []string
}

// ClientConfig returns the configuration of a client of the mesh: TLS 1.3 only,
// never resuming, the server judged by v and then by expected, both in
// VerifyConnection. A nil expected refuses every server: there is no chain-only
// check (authz 33).
func ClientConfig(cert Certificate, v *Verifier, expected func(spiffeid.ID) error, opts ClientOptions) *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		SessionTicketsDisabled: true,
		ServerName:             opts.ServerName,
		NextProtos:             opts.NextProtos,
		Time:                   v.now,
		// SPIFFE IDs, not host names, name a server here: VerifyConnection below
		// replaces the standard check, and unlike VerifyPeerCertificate always runs.
		InsecureSkipVerify: true,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return current(cert, v.now)
		},
		VerifyConnection: func(cs tls.ConnectionState) error {
			id, err := v.Peer(cs)
			if err != nil {
				return err
			}
			if expected == nil {
				return &UnexpectedPeerError{Got: id}
			}
			return expected(id)
		},
	}
}

// current refuses to present what peers would refuse, so that the cause stands in our own log.
func current(cert Certificate, now func() time.Time) (*tls.Certificate, error) {
	c, err := cert()
	if err != nil {
		return nil, err
	}
	if c == nil || len(c.Certificate) == 0 {
		return nil, errors.New("tlsconf: no certificate of our own yet")
	}
	if c.Leaf != nil && now().After(c.Leaf.NotAfter) {
		return nil, fmt.Errorf("tlsconf: our own certificate expired at %s", c.Leaf.NotAfter.Format(time.RFC3339))
	}
	return c, nil
}

// Expect accepts a server whose SPIFFE ID is among ids, and nobody when ids is
// empty: a destination without expected identities cannot be reached (authz 33).
func Expect(ids ...spiffeid.ID) func(spiffeid.ID) error {
	return func(got spiffeid.ID) error {
		for _, want := range ids {
			if got == want && !got.IsZero() {
				return nil
			}
		}
		return &UnexpectedPeerError{Got: got, Want: ids}
	}
}

// UnexpectedPeerError says that a peer is of the mesh, but not who was wanted.
type UnexpectedPeerError struct {
	Got  spiffeid.ID
	Want []spiffeid.ID
}

func (e *UnexpectedPeerError) Error() string {
	if len(e.Want) == 0 {
		return fmt.Sprintf("tlsconf: the server is %q, and no identity is expected there; declare the destination's identities", e.Got)
	}
	want := make([]string, 0, len(e.Want))
	for i, id := range e.Want {
		if i == 5 {
			want = append(want, fmt.Sprintf("%d more", len(e.Want)-i))
			break
		}
		want = append(want, fmt.Sprintf("%q", id.String()))
	}
	return fmt.Sprintf("tlsconf: the server is %q, expected %s", e.Got, strings.Join(want, " or "))
}
