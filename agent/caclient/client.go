// Package caclient asks the server for certificates and tokens on behalf of the
// node's workloads. Each call carries two credentials (trust rule 2): the token
// of the workload it is for, and the agent's own. Both are read from their files
// for every call and never logged.
//
// It refuses an answer that is not exactly what was asked for: another key,
// another identity, a chain that does not verify or has expired. It assumes that
// the file of roots is what the operator trusts; a server that does not prove
// its name under them is not spoken to.
package caclient

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/types/known/structpb"
	securityv1alpha1 "istio.io/api/security/v1alpha1"

	castellanv1 "castellan.dev/api/castellan/v1"
	"castellan.dev/identity"
)

// maxAnswer bounds what the server may send: a chain and all roots.
const maxAnswer = 1 << 20

// Config says which server is asked, and how it is known.
type Config struct {
	// Address is the server's host:port; Name is checked in its certificate.
	Address, Name string
	// Fallback is another host:port of the server, "" for none. It must prove the
	// same Name.
	Fallback string
	// BundleFile holds the roots its certificate must chain to, as PEM.
	BundleFile string
	// AgentToken is the agent's own token.
	AgentToken CredentialFile
	// Cluster travels as clusterid.
	Cluster string
	// TrustDomain is the only one whose identities are accepted in answers.
	TrustDomain spiffeid.TrustDomain
	Log         *slog.Logger
	Now         func() time.Time
}

// Client is one server's client. It is safe for concurrent use.
type Client struct {
	cfg    Config
	bundle *bundleFile

	mu      sync.Mutex
	conn    *grpc.ClientConn // for calls without a client certificate
	version [32]byte         // of the roots conn was made with
	stale   string           // last complaint about the bundle file, logged once
}

// New returns a client; nothing is opened before the first call.
func New(cfg Config) (*Client, error) {
	switch {
	case cfg.Address == "" || cfg.Name == "":
		return nil, errors.New("caclient: no server address or name")
	case cfg.BundleFile == "":
		return nil, errors.New("caclient: no bundle file; without it no server is trusted")
	case cfg.TrustDomain.IsZero():
		return nil, errors.New("caclient: no trust domain")
	}
	if cfg.Now == nil {
		cfg.Now = time.Now //nolint:forbidigo // the default clock
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Client{cfg: cfg, bundle: &bundleFile{path: cfg.BundleFile}}, nil
}

// Close ends the client's connection. Calls in flight fail.
func (c *Client) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.conn == nil {
		return nil
	}
	err := c.conn.Close()
	c.conn = nil
	return err
}

// Request asks for one certificate.
type Request struct {
	// Workload is who the answer must name.
	Workload identity.Workload
	// Token proves it.
	Token Credential
	// Key is certified; only its public half and a proof of possession leave.
	Key crypto.Signer
	// TTL is wished for; zero is the server's default.
	TTL time.Duration
}

// Issue asks for a certificate and returns it after checking it.
func (c *Client) Issue(ctx context.Context, r Request) (*Answer, error) {
	if r.Workload.TrustDomain() != c.cfg.TrustDomain {
		return nil, fmt.Errorf("caclient: %q is not of trust domain %q", r.Workload, c.cfg.TrustDomain.Name())
	}
	// The request carries no name: the token decides, and the answer is checked
	// against the name that was expected.
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, r.Key)
	if err != nil {
		return nil, fmt.Errorf("caclient: making the request: %w", err)
	}
	ctx, conn, err := c.prepare(ctx, r.Token)
	if err != nil {
		return nil, err
	}
	req := &securityv1alpha1.IstioCertificateRequest{
		Csr:              string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: csr})),
		ValidityDuration: int64(r.TTL / time.Second),
		Metadata:         &structpb.Struct{},
	}
	resp, err := securityv1alpha1.NewIstioCertificateServiceClient(conn).CreateCertificate(ctx, req, grpc.MaxCallRecvMsgSize(maxAnswer))
	if err != nil {
		return nil, fromStatus("CreateCertificate", err)
	}
	return checkChain(resp.GetCertChain(), expectation{workload: r.Workload, key: r.Key.Public(), now: c.cfg.Now()})
}

// MintJWT asks for a JWT-SVID of the workload for exactly this audience.
func (c *Client) MintJWT(ctx context.Context, workload identity.Workload, token Credential, audience []string) (*JWT, error) {
	ctx, conn, err := c.prepare(ctx, token)
	if err != nil {
		return nil, err
	}
	resp, err := castellanv1.NewIdentityClient(conn).MintJWT(ctx, &castellanv1.MintJWTRequest{Audience: audience}, grpc.MaxCallRecvMsgSize(maxAnswer))
	if err != nil {
		return nil, fromStatus("MintJWT", err)
	}
	return checkJWT(resp, workload, audience, c.cfg.Now())
}

// prepare opens the connection if needed and attaches both credentials.
func (c *Client) prepare(ctx context.Context, workload Credential) (context.Context, *grpc.ClientConn, error) {
	agent, err := c.cfg.AgentToken.Read()
	if err != nil {
		return nil, nil, badCredential("agent", err)
	}
	conn, err := c.connection()
	if err != nil {
		return nil, nil, &Error{Kind: Unreachable, Err: fmt.Errorf("caclient: %w", err)}
	}
	ctx = metadata.AppendToOutgoingContext(ctx,
		"authorization", "Bearer "+workload.value,
		"castellan-agent-token", agent.value,
		"clusterid", c.cfg.Cluster)
	return ctx, conn, nil
}

// connection returns the connection made under the roots in force; when they
// have changed, the old one is closed and its calls are tried again.
func (c *Client) connection() (*grpc.ClientConn, error) {
	r, err := c.roots()
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.conn != nil && c.version == r.version {
		return c.conn, nil
	}
	conn, err := c.dial(r, nil)
	if err != nil {
		return nil, err
	}
	if c.conn != nil {
		c.conn.Close()
	}
	c.conn, c.version = conn, r.version
	return conn, nil
}

func (c *Client) roots() (*roots, error) {
	r, stale, err := c.bundle.current()
	if err != nil {
		return nil, err
	}
	complaint := ""
	if stale != nil {
		complaint = stale.Error()
	}
	c.mu.Lock()
	repeated := complaint == c.stale
	c.stale = complaint
	c.mu.Unlock()
	if complaint != "" && !repeated {
		c.cfg.Log.Warn("bundle file unusable, the last good one stays in force", "error", complaint)
	}
	return r, nil
}

// DialMutual returns a new connection on which the agent proves its own
// identity with what certificate returns. The caller closes it. version tells
// when the roots it was made under are no longer those in force.
func (c *Client) DialMutual(certificate func() (*tls.Certificate, error)) (conn *grpc.ClientConn, version [32]byte, err error) {
	r, err := c.roots()
	if err != nil {
		return nil, version, err
	}
	conn, err = c.dial(r, certificate)
	return conn, r.version, err
}

// RootsVersion names the roots in force; zero while there are none.
func (c *Client) RootsVersion() [32]byte {
	r, _, err := c.bundle.current()
	if err != nil {
		return [32]byte{}
	}
	return r.version
}

func (c *Client) dial(r *roots, certificate func() (*tls.Certificate, error)) (*grpc.ClientConn, error) {
	// The standard verification, on every handshake; sessions are not resumed,
	// as there is no session cache.
	cfg := &tls.Config{
		MinVersion: tls.VersionTLS13,
		RootCAs:    r.pool,
		ServerName: c.cfg.Name,
		Time:       c.cfg.Now,
	}
	if certificate != nil {
		cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return certificate() }
	}
	conn, err := grpc.NewClient("passthrough:///"+c.cfg.Address,
		grpc.WithTransportCredentials(credentials.NewTLS(cfg)),
		grpc.WithContextDialer(c.connect),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 2 * time.Second},
			MinConnectTimeout: 5 * time.Second,
		}),
		// The server admits pings every 15 s.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 20 * time.Second, Timeout: 5 * time.Second, PermitWithoutStream: true}),
		grpc.WithDisableServiceConfig(),
		grpc.WithNoProxy(),
	)
	if err != nil {
		return nil, fmt.Errorf("caclient: server %q: %w", c.cfg.Address, err)
	}
	return conn, nil
}

// firstTry is how long Address has, its look-up included, before Fallback is tried.
const firstTry = 1500 * time.Millisecond

// connect opens a TCP connection to the server. Who answers is for TLS to find out.
func (c *Client) connect(ctx context.Context, address string) (net.Conn, error) {
	var dialer net.Dialer
	if c.cfg.Fallback == "" {
		return dialer.DialContext(ctx, "tcp", address)
	}
	first, cancel := context.WithTimeout(ctx, firstTry)
	defer cancel()
	conn, err := dialer.DialContext(first, "tcp", address)
	if err == nil || ctx.Err() != nil {
		return conn, err
	}
	conn, err2 := dialer.DialContext(ctx, "tcp", c.cfg.Fallback)
	if err2 != nil {
		return nil, errors.Join(err, err2)
	}
	return conn, nil
}
