package discovery

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"

	castellanv1 "castellan.dev/api/castellan/v1"
	"castellan.dev/authz"
	"castellan.dev/internal/workloads"
	"castellan.dev/internal/xds"
)

// retryKeeping is when keeping last good documents is tried again after a failure.
const retryKeeping = 10 * time.Second

// Server publishes resources to agents. It implements
// discoveryv3.AggregatedDiscoveryServiceServer (delta only),
// castellanv1.NodeServer and castellanv1.DiscoveryAdminServer.
type Server struct {
	discoveryv3.UnimplementedAggregatedDiscoveryServiceServer
	castellanv1.UnimplementedNodeServer
	castellanv1.UnimplementedDiscoveryAdminServer

	cfg     Config
	log     *slog.Logger
	metrics *metrics
	store   *lastGood
	builder *builder
	keys    *keySets
	logged  map[string]bool // refusals that have been logged

	mesh    *xds.Table // what every node gets
	nodes   nodes
	reports reports
	warner  warner
	news    news // of states and reports
	state   atomic.Pointer[state]
	good    map[Ref]good // of Run's goroutine, before the first state: from disk
}

// New checks cfg and reads the last good documents; nothing is followed before Run.
func New(cfg Config) (*Server, error) {
	if cfg.TrustDomain.IsZero() {
		return nil, errors.New("discovery: no trust domain")
	}
	if cfg.NodeOf == nil {
		return nil, errors.New("discovery: nothing to tell an agent's node by")
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now //nolint:forbidigo // the default clock
	}
	s := &Server{cfg: cfg, log: cfg.Log, logged: map[string]bool{},
		mesh:  xds.NewTable(castellanv1.TypeServiceIdentity, castellanv1.TypeJwks, castellanv1.TypeBundle, castellanv1.TypeDenylist),
		nodes: nodes{tables: map[string]*nodeTable{}}, reports: reports{byNode: map[string]map[string]*castellanv1.WorkloadReport{}},
		warner: warner{mesh: cfg.Mesh}, keys: newKeySets(cfg.Mesh, cfg.Log, cfg.Now)}
	var err error
	if s.builder, err = newBuilder(cfg.Mesh, cfg.TrustDomain); err != nil {
		return nil, err
	}
	if s.store, s.good, err = openLastGood(cfg.LastGoodDir, cfg.Mesh, cfg.Log); err != nil {
		return nil, err
	}
	if dir, ok := cfg.Source.(*Directory); ok {
		dir.resume(s.store.lastSources(s.good))
	}
	if s.metrics, err = newMetrics(cfg.Registerer); err != nil {
		return nil, fmt.Errorf("discovery: %w", err)
	}
	return s, nil
}

// Ready returns nil once a first state has been published.
func (s *Server) Ready() error {
	if s.state.Load() == nil {
		return errors.New("no policy has been read yet")
	}
	return nil
}

// seen is what one turn of Run has looked at, and how it learns of the next.
type seen struct {
	docs                                    []FileDocument
	file                                    *workloads.File
	docsChanged, fileChanged, bundleChanged <-chan struct{}
	keepAgain                               <-chan time.Time
	// policy: the documents may have changed.
	policy bool
}

// Run follows the source, the workloads and the bundle until ctx ends.
func (s *Server) Run(ctx context.Context) error {
	defer s.keys.stop()
	s.publishDenylist()
	var last seen
	for first := true; ; first = false {
		now := s.look()
		if first || closed(last.docsChanged) || closed(last.fileChanged) {
			now.policy = s.state.Load() == nil || closed(last.docsChanged)
			if now.docs != nil && now.file != nil { // nil: nothing is known yet
				s.update(ctx, now)
			}
		}
		s.publishBundle(&now)
		s.publishKeys()
		if s.keep() != nil {
			now.keepAgain = time.After(retryKeeping)
		}
		last = now
		select {
		case <-ctx.Done():
			return nil
		case <-now.docsChanged:
		case <-now.fileChanged:
		case <-now.bundleChanged:
		case <-s.keys.changed:
		case <-now.keepAgain:
		}
	}
}

func closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// look takes the channels before what they are about, so that no change is missed.
func (s *Server) look() seen {
	now := seen{docs: []FileDocument{}, file: &workloads.File{}}
	if s.cfg.Source != nil {
		now.docs, now.docsChanged = s.cfg.Source.Documents()
	}
	if s.cfg.Workloads != nil {
		now.fileChanged = s.cfg.Workloads.Changed()
		now.file = s.cfg.Workloads.Current()
	}
	return now
}

// update makes and publishes a new state.
func (s *Server) update(ctx context.Context, now seen) {
	began := s.cfg.Now()
	a := admit(now.docs, s.good)
	s.logRefusals(a)
	next, err := s.builder.build(a, now.file)
	if err != nil {
		// Nothing that was admitted can lead here. What is published stays; before
		// anything is, agents and proxies wait, and deny.
		s.log.Error("policy cannot be published, what was published stays", slog.Any("error", err))
		return
	}
	s.good = a.good
	s.state.Store(next)
	s.nodes.publish(next)
	s.mesh.Set(castellanv1.TypeServiceIdentity, next.services)
	s.keys.follow(ctx, a.docs)
	s.reports.prune(next)
	s.news.tell()
	took := s.cfg.Now().Sub(began)
	s.metrics.built(next, took)
	level := slog.LevelDebug // pods come and go all the time
	if now.policy {
		level = slog.LevelInfo
	}
	s.log.Log(ctx, level, "policy published", slog.Int("documents", len(a.docs)), slog.Int("denials", len(a.denials)),
		slog.Int("workloads", len(next.workloads)), slog.Duration("took", took))
}

// keep writes the last good documents down.
func (s *Server) keep() error {
	if s.state.Load() == nil {
		return nil // nothing is known that could replace what is on disk
	}
	err := errors.Join(s.store.keep(s.good), s.store.keepSources(s.good, s.state.Load().sources))
	if err != nil {
		s.metrics.keepErrors.Inc()
		s.log.Error("last good policy cannot be kept on disk; it is in force all the same, until a restart", slog.Any("error", err))
	}
	return err
}

// maxLogged errors of one document are logged; its status has more.
const maxLogged = 5

// logRefusals logs every refusal once, until it changes.
func (s *Server) logRefusals(a *admission) {
	logged := map[string]bool{}
	for _, st := range a.statuses {
		told := 0
		for _, f := range st.Findings {
			if f.Severity != authz.SeverityError || told == maxLogged {
				continue
			}
			told++
			key := fmt.Sprintf("%s\x00%s\x00%s\x00%s\x00%s\x00%t", st.File, st.Ref, f.Field, f.Value, f.Reason, st.lastGood)
			if !s.logged[key] && !logged[key] {
				outcome := "workloads it could select deny everything"
				switch {
				case st.notice, st.foreign:
					outcome = "nothing changes"
				case st.lastGood:
					outcome = "its last good version stays in force"
				}
				s.log.Error("policy refused", slog.String("file", st.Place()), slog.String("policy", st.Ref.String()),
					slog.String("field", f.Field), slog.String("value", f.Value), slog.String("reason", f.Reason), slog.String("outcome", outcome))
			}
			logged[key] = true
		}
	}
	s.logged = logged
}

func (s *Server) publishDenylist() {
	r, err := xds.NewResource(castellanv1.DenylistName, &castellanv1.Denylist{})
	if err != nil {
		s.log.Error("deny list cannot be published", slog.Any("error", err))
		return
	}
	s.mesh.Set(castellanv1.TypeDenylist, xds.NewSnapshot(r))
}

func (s *Server) publishBundle(now *seen) {
	if s.cfg.Bundle == nil {
		return
	}
	bundle, changed := s.cfg.Bundle()
	now.bundleChanged = changed
	if bundle == nil {
		return
	}
	r, err := xds.NewResource(bundle.GetTrustDomain(), bundle)
	if err != nil {
		s.log.Error("bundle cannot be published, the last one stays", slog.Any("error", err))
		return
	}
	s.mesh.Set(castellanv1.TypeBundle, xds.NewSnapshot(r))
}

func (s *Server) publishKeys() {
	if s.state.Load() == nil {
		return // which sources are needed is not known yet
	}
	snapshot, err := s.keys.snapshot()
	if err != nil {
		s.log.Error("key sets cannot be published, the last ones stay", slog.Any("error", err))
		return
	}
	s.mesh.Set(castellanv1.TypeJwks, snapshot)
}

// nodes holds what each node gets alone.
type nodes struct {
	mu     sync.Mutex
	last   *state
	tables map[string]*nodeTable
}

type nodeTable struct {
	*xds.Table
	streams int
	empty   bool
}

// publish gives every node its own workloads' policies.
func (n *nodes) publish(s *state) {
	byNode := map[string]xds.Snapshot{}
	for _, w := range s.workloads {
		if byNode[w.Node] == nil {
			byNode[w.Node] = xds.Snapshot{}
		}
		byNode[w.Node][w.PodUID] = w.resource
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.last = s
	for node, t := range n.tables {
		if byNode[node] == nil {
			t.set(xds.Snapshot{})
			n.dropUnused(node)
		}
	}
	for node, snapshot := range byNode {
		n.table(node).set(snapshot)
	}
}

func (t *nodeTable) set(s xds.Snapshot) {
	t.empty = len(s) == 0
	t.Set(castellanv1.TypeWorkloadPolicy, s)
}

// table returns a node's table. The caller holds mu.
func (n *nodes) table(node string) *nodeTable {
	t := n.tables[node]
	if t == nil {
		t = &nodeTable{Table: xds.NewTable(castellanv1.TypeWorkloadPolicy), empty: true}
		if n.last != nil {
			t.set(xds.Snapshot{}) // known to have no workloads
		}
		n.tables[node] = t
	}
	return t
}

// open returns the table for a stream of a node, and what to call at its end.
func (n *nodes) open(node string) (*xds.Table, func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	t := n.table(node)
	t.streams++
	return t.Table, func() {
		n.mu.Lock()
		defer n.mu.Unlock()
		t.streams--
		n.dropUnused(node)
	}
}

// dropUnused forgets a node without workloads and without streams. The caller holds mu.
func (n *nodes) dropUnused(node string) {
	if t := n.tables[node]; t != nil && t.streams == 0 && t.empty {
		delete(n.tables, node)
	}
}
