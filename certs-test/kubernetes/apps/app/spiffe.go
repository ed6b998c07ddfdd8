package main

import (
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"os"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"castellan.dev/certs-test/kubernetes/apps/control"
)

// source is the pod's identity, as a go-spiffe program has it: from the socket that
// SPIFFE_ENDPOINT_SOCKET names.
type source struct {
	started time.Time
	ready   chan struct{}
	x509    *workloadapi.X509Source // once ready
	served  atomic.Int64            // nanoseconds from start to the first SVID
	updates atomic.Int64
}

// openSource is nil where there is no socket.
func openSource(started time.Time) *source {
	if os.Getenv("SPIFFE_ENDPOINT_SOCKET") == "" {
		return nil
	}
	s := &source{started: started, ready: make(chan struct{})}
	go func() {
		x509, err := workloadapi.NewX509Source(context.Background())
		if err != nil {
			return
		}
		s.x509 = x509
		s.served.Store(int64(time.Since(s.started)))
		close(s.ready)
		for range x509.Updated() {
			s.updates.Add(1)
		}
	}()
	return s
}

func (s *source) wait(ctx context.Context) error {
	select {
	case <-s.ready:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// serve answers over mutual TLS to members of its own trust domain.
func (s *source) serve(h http.Handler) func(net.Listener) error {
	return func(l net.Listener) error {
		<-s.ready
		own, err := s.x509.GetX509SVID()
		if err != nil {
			return err
		}
		cfg := tlsconfig.MTLSServerConfig(s.x509, s.x509, tlsconfig.AuthorizeMemberOf(own.ID.TrustDomain()))
		return server(h, false).Serve(tls.NewListener(l, cfg))
	}
}

// call asks over mutual TLS a peer that must have the expected ID.
func (s *source) client(ctx context.Context, expect string) (*http.Client, error) {
	if err := s.wait(ctx); err != nil {
		return nil, err
	}
	id, err := spiffeid.FromString(expect)
	if err != nil {
		return nil, err
	}
	cfg := tlsconfig.MTLSClientConfig(s.x509, s.x509, tlsconfig.AuthorizeID(id))
	return &http.Client{Transport: &http.Transport{TLSClientConfig: cfg, DisableKeepAlives: true}}, nil
}

// identity says what the pod was given.
func (s *source) identity(ctx context.Context) (*control.Identity, error) {
	if err := s.wait(ctx); err != nil {
		return nil, err
	}
	svid, err := s.x509.GetX509SVID()
	if err != nil {
		return nil, err
	}
	leaf := svid.Certificates[0]
	return &control.Identity{
		ID: svid.ID.String(), Serial: leaf.SerialNumber.Text(16), NotAfter: leaf.NotAfter,
		Updates: int(s.updates.Load()), Served: time.Duration(s.served.Load()),
	}, nil
}

// jwt is a JWT-SVID for the audience.
func (s *source) jwt(ctx context.Context, audience string) (string, error) {
	client, err := workloadapi.New(ctx)
	if err != nil {
		return "", err
	}
	defer client.Close()
	svid, err := client.FetchJWTSVID(ctx, jwtsvid.Params{Audience: audience})
	if err != nil {
		return "", err
	}
	return svid.Marshal(), nil
}
