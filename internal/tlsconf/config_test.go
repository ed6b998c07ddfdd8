package tlsconf_test

import (
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"castellan.dev/internal/tlsconf"
	"castellan.dev/internal/tlsconf/tlsconftest"
)

const orders = "spiffe://cluster.local/ns/shop/sa/orders"

func fixed(c *tls.Certificate) tlsconf.Certificate {
	return func() (*tls.Certificate, error) { return c, nil }
}

// handshake runs both sides over a pipe and returns their errors.
func handshake(t *testing.T, client, server *tls.Config) (cs tls.ConnectionState, clientErr, serverErr error) {
	t.Helper()
	a, b := net.Pipe()
	deadline := time.Now().Add(10 * time.Second)
	_ = a.SetDeadline(deadline)
	_ = b.SetDeadline(deadline)
	done := make(chan error, 1)
	srv := tls.Server(b, server)
	go func() {
		err := srv.Handshake()
		if err == nil {
			_, err = srv.Write([]byte("x"))
		}
		b.Close()
		done <- err
	}()
	cli := tls.Client(a, client)
	clientErr = cli.Handshake()
	if clientErr == nil {
		// In TLS 1.3 the client learns of a refusal with its first read.
		_, clientErr = io.ReadFull(cli, make([]byte, 1))
	}
	a.Close()
	serverErr = <-done
	return cli.ConnectionState(), clientErr, serverErr
}

func TestHandshakeBothWays(t *testing.T) {
	root := tlsconftest.NewRoot(t)
	issuer := root.SVIDIssuer(t)
	v := verifier(trustOf(root.Cert))
	clientCert, serverCert := issuer.Leaf(t, frontend), issuer.Leaf(t, orders)
	want := spiffeid.RequireFromString(orders)
	serving := root.ServingIssuer(t).Leaf(t, orders)
	expired := issuer.Leaf(t, frontend, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) })
	none := func() (*tls.Certificate, error) { return nil, nil }

	tests := map[string]struct {
		client, server         *tls.Config
		clientWant, serverWant string
	}{
		"good": {
			client: tlsconf.ClientConfig(fixed(clientCert), v, tlsconf.Expect(want), tlsconf.ClientOptions{}),
			server: tlsconf.ServerConfig(fixed(serverCert), v, tlsconf.ServerOptions{}),
		},
		"authz-33 another identity": {
			client:     tlsconf.ClientConfig(fixed(clientCert), v, tlsconf.Expect(spiffeid.RequireFromString("spiffe://cluster.local/ns/shop/sa/payments")), tlsconf.ClientOptions{}),
			server:     tlsconf.ServerConfig(fixed(serverCert), v, tlsconf.ServerOptions{}),
			clientWant: `the server is "spiffe://cluster.local/ns/shop/sa/orders", expected "spiffe://cluster.local/ns/shop/sa/payments"`,
			serverWant: "bad certificate",
		},
		"authz-33 empty expected set": {
			client:     tlsconf.ClientConfig(fixed(clientCert), v, tlsconf.Expect(), tlsconf.ClientOptions{}),
			server:     tlsconf.ServerConfig(fixed(serverCert), v, tlsconf.ServerOptions{}),
			clientWant: `the server is "spiffe://cluster.local/ns/shop/sa/orders", and no identity is expected there`,
			serverWant: "bad certificate",
		},
		"authz-33 no predicate": {
			client:     tlsconf.ClientConfig(fixed(clientCert), v, nil, tlsconf.ClientOptions{}),
			server:     tlsconf.ServerConfig(fixed(serverCert), v, tlsconf.ServerOptions{}),
			clientWant: "no identity is expected there",
			serverWant: "bad certificate",
		},
		"client without certificate": {
			client:     &tls.Config{InsecureSkipVerify: true},
			server:     tlsconf.ServerConfig(fixed(serverCert), v, tlsconf.ServerOptions{}),
			clientWant: "certificate required",
			serverWant: "client didn't provide a certificate",
		},
		"client of TLS 1.2": {
			client:     &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12},
			server:     tlsconf.ServerConfig(fixed(serverCert), v, tlsconf.ServerOptions{}),
			clientWant: "protocol version not supported",
			serverWant: "client offered only unsupported versions",
		},
		"server of TLS 1.2": {
			client:     tlsconf.ClientConfig(fixed(clientCert), v, tlsconf.Expect(want), tlsconf.ClientOptions{}),
			server:     &tls.Config{Certificates: []tls.Certificate{*serverCert}, MaxVersion: tls.VersionTLS12},
			clientWant: "protocol version not supported",
			serverWant: "client offered only unsupported versions",
		},
		"trust-06 server with a serving certificate": {
			client:     tlsconf.ClientConfig(fixed(clientCert), v, tlsconf.Expect(want), tlsconf.ClientOptions{}),
			server:     &tls.Config{Certificates: []tls.Certificate{*serving}},
			clientWant: "for clientAuth: x509: certificate specifies an incompatible key usage",
			serverWant: "bad certificate",
		},
		"trust-06 client with a serving certificate": {
			client:     &tls.Config{Certificates: []tls.Certificate{*serving}, InsecureSkipVerify: true},
			server:     tlsconf.ServerConfig(fixed(serverCert), v, tlsconf.ServerOptions{}),
			clientWant: "bad certificate",
			serverWant: "for clientAuth: x509: certificate specifies an incompatible key usage",
		},
		"our own certificate expired": {
			client:     tlsconf.ClientConfig(fixed(expired), v, tlsconf.Expect(want), tlsconf.ClientOptions{}),
			server:     tlsconf.ServerConfig(fixed(serverCert), v, tlsconf.ServerOptions{}),
			clientWant: "tlsconf: our own certificate expired at ",
			serverWant: "EOF",
		},
		"no certificate of our own": {
			client:     tlsconf.ClientConfig(fixed(clientCert), v, tlsconf.Expect(want), tlsconf.ClientOptions{}),
			server:     tlsconf.ServerConfig(none, v, tlsconf.ServerOptions{}),
			clientWant: "internal error",
			serverWant: "tlsconf: no certificate of our own yet",
		},
		"optional client": {
			client: &tls.Config{InsecureSkipVerify: true},
			server: tlsconf.ServerConfig(fixed(serverCert), v, tlsconf.ServerOptions{InsecureOptionalClient: true}),
		},
		"optional client, expired certificate": {
			client: &tls.Config{Certificates: []tls.Certificate{*expired}, InsecureSkipVerify: true},
			server: tlsconf.ServerConfig(fixed(serverCert), v, tlsconf.ServerOptions{InsecureOptionalClient: true}),
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			_, clientErr, serverErr := handshake(t, tt.client, tt.server)
			for side, c := range map[string]struct {
				err  error
				want string
			}{"client": {clientErr, tt.clientWant}, "server": {serverErr, tt.serverWant}} {
				if c.want == "" && c.err != nil || c.want != "" && (c.err == nil || !strings.Contains(c.err.Error(), c.want)) {
					t.Errorf("%s: err %v, want %q", side, c.err, c.want)
				}
			}
		})
	}
}

// A session is never resumed, even where the client would like to.
func TestNoResumption(t *testing.T) {
	root := tlsconftest.NewRoot(t)
	v := verifier(trustOf(root.Cert))
	server := tlsconf.ServerConfig(fixed(root.Leaf(t, orders)), v, tlsconf.ServerOptions{})
	client := &tls.Config{
		Certificates: []tls.Certificate{*root.Leaf(t, frontend)}, InsecureSkipVerify: true,
		ClientSessionCache: tls.NewLRUClientSessionCache(4), ServerName: "orders",
	}
	for range 2 {
		cs, clientErr, serverErr := handshake(t, client, server)
		if clientErr != nil || serverErr != nil || cs.DidResume {
			t.Fatalf("client %v, server %v, resumed %v", clientErr, serverErr, cs.DidResume)
		}
	}
}

func TestUnexpectedPeerErrorIsBounded(t *testing.T) {
	ids := make([]spiffeid.ID, 1000)
	for i := range ids {
		ids[i] = spiffeid.RequireFromString(orders)
	}
	err := tlsconf.Expect(ids...)(spiffeid.RequireFromString(frontend))
	var unexpected *tlsconf.UnexpectedPeerError
	if !errors.As(err, &unexpected) || !strings.HasSuffix(err.Error(), "or 995 more") {
		t.Fatalf("err %v", err)
	}
}

// CVE-2026-47778: what is before a NUL must not be taken for the whole identity.
func TestNULInURIIsRefused(t *testing.T) {
	root := tlsconftest.NewRoot(t)
	v := verifier(trustOf(root.Cert))
	good := root.Leaf(t, frontend)
	der, err := asn1.Marshal([]asn1.RawValue{{Class: asn1.ClassContextSpecific, Tag: 6, Bytes: []byte(frontend + "\x00.evil.example")}})
	if err != nil {
		t.Fatal(err)
	}
	template := *good.Leaf
	template.URIs = nil
	template.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Critical: true, Value: der}}
	leaf, err := x509.CreateCertificate(rand.Reader, &template, root.Cert, good.Leaf.PublicKey, root.Key)
	if err != nil {
		t.Fatal(err)
	}
	_, _, serverErr := handshake(t,
		&tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{{Certificate: [][]byte{leaf}, PrivateKey: good.PrivateKey}}},
		tlsconf.ServerConfig(fixed(root.Leaf(t, orders)), v, tlsconf.ServerOptions{}))
	if serverErr == nil || !strings.Contains(serverErr.Error(), "invalid control character") {
		t.Fatalf("err %v", serverErr)
	}
}
