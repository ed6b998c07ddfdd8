// Package upstream is the agent's side of the server's discovery stream: it
// follows policy, service identities, key sets, bundles and the deny list for
// this node, shows each workload its part, and reports back what the workloads'
// own streams have applied.
//
// Without a server everything that was received stays in force. It refuses a
// resource that is not what its type says, and a bundle without roots. It
// assumes that a server that proved its name under the configured roots may
// decide policy.
package upstream

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"castellan.dev/agent/caclient"
	"castellan.dev/agent/svid"
	"castellan.dev/internal/xds"
)

// maxResponse bounds one message of the server.
const maxResponse = 64 << 20

// Trust takes bundles; *svid.Rotator does.
type Trust interface {
	SetBundle(td spiffeid.TrustDomain, roots [][]byte, jwks []byte, sequence uint64, refreshHint time.Duration) error
	RemoveBundle(td spiffeid.TrustDomain)
}

// Identity is the agent's own: who it proves to be on the stream.
type Identity interface {
	// Current is its SVID's state.
	Current() (*svid.Snapshot, <-chan struct{})
}

// Config sets up a Follower.
type Config struct {
	Client *caclient.Client
	Own    Identity
	// Renew asks for a new certificate of the agent, because the server refused this one.
	Renew func()
	// Reached is called when a server has answered after there was none.
	Reached func()
	Trust   Trust
	// TrustDomain is our own: its bundle is never dropped.
	TrustDomain spiffeid.TrustDomain
	Node        string
	Registerer  prometheus.Registerer
	Log         *slog.Logger
}

// Follower follows the server's resources and reports to it.
type Follower struct {
	cfg    Config
	client *xds.Client
	tables *tables
	// Reports is what the workloads' streams have applied.
	Reports *Reports

	connected atomic.Bool
	gauge     prometheus.Gauge

	mu sync.Mutex
	// The stream keeps its connection for as long as it lasts. Reports are calls,
	// and each is made with the certificate of the day.
	streaming, reporting *connection
}

// connection is one mTLS connection and what it was made with.
type connection struct {
	*grpc.ClientConn
	serial string
	roots  [32]byte
}

// New returns a Follower that does nothing before Run.
func New(cfg Config) (*Follower, error) {
	if cfg.Client == nil || cfg.Own == nil || cfg.Trust == nil || cfg.Node == "" {
		return nil, errors.New("upstream: a client, the agent's identity, where bundles go and the node's name are needed")
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	for _, f := range []*func(){&cfg.Renew, &cfg.Reached} {
		if *f == nil {
			*f = func() {}
		}
	}
	f := &Follower{cfg: cfg, tables: newTables(cfg.Trust, cfg.TrustDomain)}
	f.gauge = prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "castellan_agent_server_connected", Help: "1 while the discovery stream to the server is up.",
	})
	results := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "castellan_agent_reports_total", Help: "Reports to the server, by result: sent, failed.",
	}, []string{"result"})
	if cfg.Registerer != nil {
		cfg.Registerer.MustRegister(f.gauge, results)
	}
	f.Reports = newReports(cfg.Node, results, cfg.Log)
	f.client = xds.NewClient(xds.ClientConfig{
		Open: f.open, NodeID: cfg.Node, Subscriptions: f.tables.subscriptions(), Log: cfg.Log,
	})
	return f, nil
}

// Run follows and reports until ctx ends.
func (f *Follower) Run(ctx context.Context) error {
	defer f.drop(&f.streaming, nil)
	defer f.drop(&f.reporting, nil)
	var beside sync.WaitGroup
	defer beside.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	beside.Go(func() { f.Reports.run(ctx, f.report) })
	beside.Go(func() { f.distrust(ctx) })
	for ctx.Err() == nil {
		if err := f.followOnce(ctx); err != nil {
			return err
		}
	}
	return nil
}

// followOnce follows with one certificate. When the agent has a newer one the
// stream is opened again with it, without a pause and before the server has to
// end it because the old one expired; what has been received stays.
func (f *Follower) followOnce(parent context.Context) error {
	ctx, cancel := context.WithCancel(parent)
	defer cancel()
	own, err := f.ownSVID(ctx)
	if err != nil {
		return nil // the end, before the first certificate
	}
	var watching sync.WaitGroup
	defer watching.Wait()
	watching.Go(func() {
		defer cancel()
		for {
			now, changed := f.cfg.Own.Current()
			if now.SVID != nil && now.SVID.Serial != own.Serial {
				return
			}
			select {
			case <-changed:
			case <-ctx.Done():
				return
			}
		}
	})
	return f.client.Run(ctx)
}

// distrustInterval is how soon a server that proved its name under roots that
// have been replaced is no longer listened to.
const distrustInterval = 5 * time.Second

// distrust ends the stream when the file of roots has changed: the server has to
// prove itself again, under those in force.
func (f *Follower) distrust(ctx context.Context) {
	ticker := time.NewTicker(distrustInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		now := f.cfg.Client.RootsVersion()
		f.mu.Lock()
		conn := f.streaming
		f.mu.Unlock()
		if conn != nil && conn.roots != now {
			f.cfg.Log.Info("the bundle file has changed; the server must prove itself again")
			f.drop(&f.streaming, conn)
		}
	}
}

// Connected reports whether a stream is up on which the server has answered.
func (f *Follower) Connected() bool { return f.connected.Load() }

// Synced reports whether the server has ever answered.
func (f *Follower) Synced() bool { return f.tables.synced() }

// View returns what one workload may see; Close it when the workload goes.
func (f *Follower) View() *View { return f.tables.view() }

// open opens a stream as the agent, once it has a certificate.
func (f *Follower) open(ctx context.Context) (xds.DeltaClientStream, error) {
	conn, err := f.dial(ctx, &f.streaming)
	if err != nil {
		f.lost()
		return nil, err
	}
	stream, err := discoveryv3.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(ctx, grpc.MaxCallRecvMsgSize(maxResponse))
	if err != nil {
		f.lost()
		f.judge(&f.streaming, conn, err)
		return nil, fmt.Errorf("upstream: opening the discovery stream: %w", err)
	}
	return &followed{AggregatedDiscoveryService_DeltaAggregatedResourcesClient: stream, follower: f, conn: conn}, nil
}

// dial returns slot's connection if it was made with the agent's present
// certificate under the roots in force, or else a new one in its place. It waits
// for the first certificate.
func (f *Follower) dial(ctx context.Context, slot **connection) (*connection, error) {
	own, err := f.ownSVID(ctx)
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	old := *slot
	if old != nil && old.serial == own.Serial && old.roots == f.cfg.Client.RootsVersion() {
		return old, nil
	}
	inner, roots, err := f.cfg.Client.DialMutual(f.certificate)
	if err != nil {
		return nil, fmt.Errorf("upstream: %w", err)
	}
	if old != nil {
		old.Close()
	}
	*slot = &connection{ClientConn: inner, serial: own.Serial, roots: roots}
	return *slot, nil
}

func (f *Follower) ownSVID(ctx context.Context) (*svid.SVID, error) {
	for {
		own, changed := f.cfg.Own.Current()
		if own.SVID != nil {
			return own.SVID, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// certificate is asked for at every handshake, so that it is never an old one.
func (f *Follower) certificate() (*tls.Certificate, error) {
	own, _ := f.cfg.Own.Current()
	if own.SVID == nil {
		return nil, errors.New("the agent has no certificate")
	}
	return own.SVID.TLSCertificate(), nil
}

// judge decides what a failure says about the connection: a server that does not
// take our certificate gets a new connection, with a new certificate.
func (f *Follower) judge(slot **connection, conn *connection, err error) {
	switch status.Code(err) {
	case codes.Unauthenticated, codes.PermissionDenied:
		f.cfg.Log.Warn("the server refuses the agent's certificate; attesting again", "error", err)
		f.drop(slot, conn)
		f.cfg.Renew()
	}
}

// drop closes slot's connection if it still is conn; nil closes whatever it is.
func (f *Follower) drop(slot **connection, conn *connection) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if *slot != nil && (conn == nil || *slot == conn) {
		(*slot).Close()
		*slot = nil
	}
}

// followed watches a stream for its first answer and its end.
type followed struct {
	discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesClient
	follower *Follower
	conn     *connection
	answered bool
}

// lost notes that there is no server.
func (f *Follower) lost() {
	f.connected.Store(false)
	f.gauge.Set(0)
}

// Recv notes whether there is a server.
func (s *followed) Recv() (*discoveryv3.DeltaDiscoveryResponse, error) {
	resp, err := s.AggregatedDiscoveryService_DeltaAggregatedResourcesClient.Recv()
	f := s.follower
	switch {
	case status.Code(err) == codes.Canceled:
		// Ended by us: to be opened again at once, or because all ends.
	case err != nil:
		f.lost()
		f.judge(&f.streaming, s.conn, err)
	case !s.answered:
		s.answered = true
		f.gauge.Set(1)
		if !f.connected.Swap(true) {
			f.cfg.Log.Info("following the server", "node", f.cfg.Node)
		}
		f.cfg.Reached()
		f.Reports.resend()
	}
	return resp, err
}
