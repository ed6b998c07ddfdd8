package upstream

import (
	"fmt"
	"maps"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	castellanv1 "castellan.dev/api/castellan/v1"
	"castellan.dev/internal/xds"
)

// Type URLs of what the server sends and workloads are shown.
const (
	TypeWorkloadPolicy  = "type.googleapis.com/castellan.v1.WorkloadPolicy"
	TypeServiceIdentity = "type.googleapis.com/castellan.v1.ServiceIdentity"
	TypeJwks            = "type.googleapis.com/castellan.v1.Jwks"
	TypeBundle          = "type.googleapis.com/castellan.v1.Bundle"
	TypeDenylist        = "type.googleapis.com/castellan.v1.Denylist"
)

// Types returns every type a workload's discovery stream may ask for.
func Types() []string {
	return []string{TypeWorkloadPolicy, TypeServiceIdentity, TypeJwks, TypeBundle, TypeDenylist}
}

// tables is what the server has said last, by type.
type tables struct {
	shared *xds.Table // all types but WorkloadPolicy
	trust  Trust
	own    spiffeid.TrustDomain

	answered atomic.Bool

	mu       sync.Mutex
	held     map[string]xds.Snapshot
	policies xds.Snapshot // nil until the server has answered
	views    map[*View]struct{}
}

func newTables(trust Trust, own spiffeid.TrustDomain) *tables {
	return &tables{
		shared: xds.NewTable(TypeServiceIdentity, TypeJwks, TypeBundle, TypeDenylist),
		trust:  trust, own: own, held: map[string]xds.Snapshot{}, views: map[*View]struct{}{},
	}
}

func (t *tables) synced() bool { return t.answered.Load() }

func (t *tables) subscriptions() []xds.Subscription {
	messages := map[string]func() proto.Message{
		TypeWorkloadPolicy:  func() proto.Message { return &castellanv1.WorkloadPolicy{} },
		TypeServiceIdentity: func() proto.Message { return &castellanv1.ServiceIdentity{} },
		TypeJwks:            func() proto.Message { return &castellanv1.Jwks{} },
		TypeBundle:          func() proto.Message { return &castellanv1.Bundle{} },
		TypeDenylist:        func() proto.Message { return &castellanv1.Denylist{} },
	}
	var subs []xds.Subscription
	for _, url := range Types() {
		subs = append(subs, xds.Subscription{TypeURL: url, Apply: func(changed []xds.Resource, removed []string) error {
			return t.apply(url, messages[url], changed, removed)
		}})
	}
	return subs
}

// apply takes one update of one type, all of it or, with an error, nothing.
func (t *tables) apply(url string, message func() proto.Message, changed []xds.Resource, removed []string) error {
	for _, r := range changed {
		m := message()
		if r.Body.GetTypeUrl() != url || proto.Unmarshal(r.Body.GetValue(), m) != nil {
			return fmt.Errorf("resource %q is not a %s", r.Name, url)
		}
		if b, ok := m.(*castellanv1.Bundle); ok {
			if err := t.trustBundle(r.Name, b); err != nil {
				return err
			}
		}
	}
	if url == TypeBundle {
		removed = t.distrust(removed)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	next := maps.Clone(t.held[url])
	if next == nil {
		next = xds.Snapshot{}
	}
	for _, r := range changed {
		next[r.Name] = r
	}
	for _, name := range removed {
		delete(next, name)
	}
	t.held[url] = next
	t.answered.Store(true)
	if url != TypeWorkloadPolicy {
		t.shared.Set(url, next)
		return nil
	}
	t.policies = next
	for v := range t.views {
		v.show(next)
	}
	return nil
}

func (t *tables) trustBundle(name string, b *castellanv1.Bundle) error {
	td, err := spiffeid.TrustDomainFromString(b.GetTrustDomain())
	if err != nil || td.Name() != name {
		return fmt.Errorf("bundle %q is of trust domain %q", name, b.GetTrustDomain())
	}
	hint := time.Duration(min(max(b.GetRefreshHintSeconds(), 0), maxRefreshHint)) * time.Second
	return t.trust.SetBundle(td, b.GetX509Authorities(), b.GetJwtAuthorities(), b.GetSequence(), hint)
}

// maxRefreshHint is a year in seconds.
const maxRefreshHint = 365 * 24 * 3600

// distrust drops foreign trust domains and returns what was dropped. Our own
// bundle stays: nothing could be verified without it, and a server that has none
// is broken, not revoking.
func (t *tables) distrust(removed []string) []string {
	var dropped []string
	for _, name := range removed {
		td, err := spiffeid.TrustDomainFromString(name)
		if err == nil && td == t.own {
			continue
		}
		if err == nil {
			t.trust.RemoveBundle(td)
		}
		dropped = append(dropped, name)
	}
	return dropped
}

// View is what one workload may see: its own policy, and what is mesh-wide. It
// implements xds.Source.
type View struct {
	tables *tables
	policy *xds.Table
	podUID string // guarded by tables.mu
}

func (t *tables) view() *View {
	v := &View{tables: t, policy: xds.NewTable(TypeWorkloadPolicy)}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.views[v] = struct{}{}
	return v
}

// SetPod says whose policy is shown; before that none is.
func (v *View) SetPod(uid string) {
	v.tables.mu.Lock()
	defer v.tables.mu.Unlock()
	v.podUID = uid
	v.show(v.tables.policies)
}

// Close forgets the view.
func (v *View) Close() {
	v.tables.mu.Lock()
	defer v.tables.mu.Unlock()
	delete(v.tables.views, v)
}

// show picks the pod's policy. While nothing is known of the pod or of policies,
// nothing is said: the stream waits, and its client denies everything.
func (v *View) show(all xds.Snapshot) {
	if all == nil || v.podUID == "" {
		return
	}
	one := xds.Snapshot{}
	if r, ok := all[v.podUID]; ok {
		one[v.podUID] = r
	}
	v.policy.Set(TypeWorkloadPolicy, one)
}

// Resources implements xds.Source.
func (v *View) Resources(typeURL string) (xds.Snapshot, <-chan struct{}) {
	if typeURL == TypeWorkloadPolicy {
		return v.policy.Resources(typeURL)
	}
	return v.tables.shared.Resources(typeURL)
}
