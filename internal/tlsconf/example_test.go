package tlsconf_test

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"castellan.dev/internal/tlsconf"
)

// A client that will talk to the orders service and to nobody else.
func ExampleClientConfig() {
	var (
		svid  = func() (*tls.Certificate, error) { return nil, nil } // the workload's own, asked at every handshake
		trust = tlsconf.Trust{
			TrustDomain: spiffeid.RequireTrustDomainFromString("cluster.local"),
			Roots:       []*x509.Certificate{ /* the bundle's */ },
			Version:     "7",
		}
	)
	v := tlsconf.NewVerifier(func() *tlsconf.Trust { return &trust }, nil)
	cfg := tlsconf.ClientConfig(svid, v,
		tlsconf.Expect(spiffeid.RequireFromString("spiffe://cluster.local/ns/shop/sa/orders")),
		tlsconf.ClientOptions{ServerName: "outbound_.80_._.orders.shop.svc.cluster.local", NextProtos: []string{"istio"}})
	fmt.Println(cfg.MinVersion == tls.VersionTLS13, cfg.VerifyPeerCertificate == nil)
	// Output: true true
}

// Nobody is expected, so nobody is accepted.
func ExampleExpect() {
	err := tlsconf.Expect()(spiffeid.RequireFromString("spiffe://cluster.local/ns/shop/sa/orders"))
	fmt.Println(err)
	// Output: tlsconf: the server is "spiffe://cluster.local/ns/shop/sa/orders", and no identity is expected there; declare the destination's identities
}
