package discovery

import (
	"sync"

	castellanv1 "castellan.dev/api/castellan/v1"
	"castellan.dev/api/policy"
	"castellan.dev/authz"
)

// DocumentStatus is what became of one document.
type DocumentStatus struct {
	Ref
	// UID and Generation say of which version of which object this is.
	UID        string
	Generation int64
	// Accepted: it is in force. Else LastGoodInForce, an earlier version is; or Denies,
	// there is none, and whoever it could select denies everything.
	Accepted, LastGoodInForce, Denies bool
	// Findings are the errors it was refused for, and warnings. They must not be changed.
	Findings []authz.Finding
	// Selected are the workloads of the mesh that it selects (or denies), Programmed
	// those whose every stream has acknowledged what they are told now, and Refused
	// those that have refused it.
	Selected, Programmed, Refused int
}

// Statuses returns what became of every document that has a name, and a channel
// that is closed when that may have changed. Nil means that nothing is known yet.
func (s *Server) Statuses() ([]DocumentStatus, <-chan struct{}) {
	changed := s.news.changed() // before what it is about
	st := s.state.Load()
	if st == nil {
		return nil, changed
	}
	t := s.tally(st)
	findings := s.warner.findings(st)
	out := make([]DocumentStatus, 0, len(st.statuses))
	for i := range st.statuses {
		p := &st.statuses[i]
		if p.notice || !p.Ref.complete() {
			continue
		}
		c := t.of(p, s.cfg.Mesh)
		out = append(out, DocumentStatus{Ref: p.Ref, UID: p.UID, Generation: p.Generation,
			Accepted: p.accepted, LastGoodInForce: p.lastGood, Denies: p.denies != nil, Findings: findings[i],
			Selected: int(c.selected), Programmed: int(c.programmed), Refused: int(c.refused)})
	}
	return out, changed
}

// count is of the workloads a document selects, and of those that enforce or
// refuse it.
type count struct{ selected, programmed, refused uint32 }

func (c *count) add(acknowledged, refused bool) {
	c.selected++
	if acknowledged {
		c.programmed++
	}
	if refused {
		c.refused++
	}
}

// tally is what has been reported of a state's workloads.
type tally struct {
	st *state
	// By the workloads' places.
	reports               []*castellanv1.WorkloadReport
	acknowledged, refused []bool
	counts                map[Ref]count
	byNamespace           map[string][]int // "" has all
}

func (s *Server) tally(st *state) *tally {
	n := len(st.workloads)
	t := &tally{st: st, reports: s.reports.all(st.workloads), acknowledged: make([]bool, n), refused: make([]bool, n), counts: make(map[Ref]count, len(st.docs))}
	byDoc := make(map[*inForce]*count, len(st.docs))
	for i, w := range st.workloads {
		t.acknowledged[i], t.refused[i] = programmed(w, t.reports[i])
		for _, d := range w.docs {
			c := byDoc[d]
			if c == nil {
				c = &count{}
				byDoc[d] = c
			}
			c.add(t.acknowledged[i], t.refused[i])
		}
	}
	for d, c := range byDoc {
		t.counts[d.ref] = *c
	}
	return t
}

// of counts for one document.
func (t *tally) of(p *docStatus, mesh policy.Mesh) (c count) {
	switch {
	case p.accepted || p.lastGood:
		return t.counts[p.Ref]
	case p.denies != nil:
		for _, i := range t.places(p.denies.namespace, mesh) {
			if w := t.st.workloads[i]; p.denies.covers(w.Namespace, w.Labels, mesh) {
				c.add(t.acknowledged[i], t.refused[i])
			}
		}
	}
	return c
}

// places are of the workloads that a document of a namespace could select: of
// many documents that are refused each looks at its own namespace's only.
func (t *tally) places(namespace string, mesh policy.Mesh) []int {
	if t.byNamespace == nil {
		t.byNamespace = map[string][]int{}
		for i, w := range t.st.workloads {
			t.byNamespace[""] = append(t.byNamespace[""], i)
			t.byNamespace[w.Namespace] = append(t.byNamespace[w.Namespace], i)
		}
	}
	if namespace == rootNamespace(mesh) {
		namespace = ""
	}
	return t.byNamespace[namespace]
}

// news tells whoever waits that something has changed.
type news struct {
	mu sync.Mutex
	c  chan struct{}
}

func (n *news) changed() <-chan struct{} {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.c == nil {
		n.c = make(chan struct{})
	}
	return n.c
}

func (n *news) tell() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.c != nil {
		close(n.c)
		n.c = nil
	}
}
