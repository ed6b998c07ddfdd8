package agent

import (
	"context"
	"log/slog"
	"net"
	"sync"

	"castellan.dev/agent/svid"
	"castellan.dev/agent/upstream"
	"castellan.dev/agent/workloadapi"
	"castellan.dev/identity"
)

// workloadServer is one identity with all that is served to whom it belongs. It may have
// several sockets, which all serve the same.
type workloadServer struct {
	account  identity.Account
	tenant   *tenant
	source   *svid.Source
	view     *upstream.View
	reporter *upstream.Reporter
	jwts     workloadapi.JWTs
	log      *slog.Logger

	mu      sync.Mutex
	sockets map[*socket]struct{}
	valid   bool
}

// newWorkload begins to have certificates issued for id. End it with close.
func (a *Agent) newWorkload(id svid.Identity) *workloadServer {
	source := a.rotator.Add(id)
	return &workloadServer{
		account: id.Account, tenant: a.room.tenant(id.Account.Namespace()), source: source, view: a.follower.View(), reporter: a.follower.Reports.Workload(source),
		jwts: a.rotator.JWTs(source, a.client), sockets: map[*socket]struct{}{},
		log: a.cfg.Log.With("account", id.Account.String()),
	}
}

// open makes a socket that serves w on l, once it runs.
func (a *Agent) open(w *workloadServer, l net.Listener) (*socket, error) {
	s, err := newSocket(socketConfig{
		listener: l, tenant: w.tenant, source: w.source, jwts: w.jwts, view: w.view, reporter: w.reporter,
		metrics: a.metrics, log: w.log, now: a.cfg.Now, deadlines: a.deadlines,
	})
	if err != nil {
		return nil, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	s.show(w.valid)
	w.sockets[s] = struct{}{}
	return s, nil
}

// forget takes a socket out that runs no more, and returns how many are left.
func (w *workloadServer) forget(s *socket) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.sockets, s)
	return len(w.sockets)
}

// follow carries changes of the workload's state to what is not a stream, until
// ctx ends.
func (w *workloadServer) follow(ctx context.Context) error {
	for {
		state, changed := w.source.Current()
		w.view.SetPod(state.PodUID)
		w.reporter.Touch()
		w.show(state.Status == svid.Valid)
		select {
		case <-changed:
		case <-ctx.Done():
			return nil
		}
	}
}

func (w *workloadServer) show(valid bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.valid = valid
	for s := range w.sockets {
		s.show(valid)
	}
}

// close ends a workload whose sockets have ended.
func (w *workloadServer) close() {
	w.view.Close()
	w.reporter.Close()
}
