package kube

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/watchlist"

	"castellan.dev/api/policy"
)

// lookAgain is when an API server that does not serve a kind is asked again.
const lookAgain = 2 * time.Second

// policyVersions of the group, the better first.
func policyVersions() []string { return []string{"v1", "v1beta1"} }

// policyResources are the kinds by the name of their resource.
func policyResources() []struct{ kind, resource string } {
	return []struct{ kind, resource string }{
		{policy.KindAuthorization, "authorizationpolicies"},
		{policy.KindPeerAuthentication, "peerauthentications"},
		{policy.KindRequestAuthentication, "requestauthentications"},
	}
}

// Policies follows the three kinds of policy, whoever has installed their
// definitions and whenever. A kind that the API server does not serve has no
// objects; once any has been seen, only the API server's word on each takes them
// away, not that the kind is gone for a while.
type Policies struct {
	cfg   InformersConfig
	kinds []*policyKind
	pacer pacer

	mu      sync.Mutex
	objects []policy.Object
	known   bool
	changed chan struct{}
}

// policyKind is one kind.
type policyKind struct {
	kind, resource string

	mu sync.Mutex
	// live is the mirror that has been listed last, next one that is about to.
	live, next *mirror
	// version that next is of.
	version string
	// absent: the API server has said that it does not serve the kind.
	absent  bool
	failure error
}

func newPolicies(cfg InformersConfig) *Policies {
	p := &Policies{cfg: cfg, pacer: newPacer(), changed: make(chan struct{})}
	for _, r := range policyResources() {
		p.kinds = append(p.kinds, &policyKind{kind: r.kind, resource: r.resource})
	}
	return p
}

// Objects returns every policy, and a channel that is closed at the next change.
// Nil means that they are not all known yet.
func (p *Policies) Objects() ([]policy.Object, <-chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.objects, p.changed
}

// Ready returns nil once every kind has been listed or is known to be missing.
func (p *Policies) Ready() error {
	for _, k := range p.kinds {
		if err := k.ready(); err != nil {
			return err
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.known {
		return errors.New("kubernetes: policies have not been read yet")
	}
	return nil
}

func (k *policyKind) ready() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	switch {
	case k.live != nil || k.absent:
		return nil
	case k.failure != nil:
		return fmt.Errorf("kubernetes: %s: %w", k.resource, k.failure)
	case k.next != nil && k.next.problem() != nil:
		return fmt.Errorf("kubernetes: %s cannot be listed: %w", k.resource, k.next.problem())
	}
	return fmt.Errorf("kubernetes: %s have not been listed yet", k.resource)
}

// Missing says which kinds the API server does not serve, nil if it serves all.
func (p *Policies) Missing() error {
	var missing []string
	for _, k := range p.kinds {
		k.mu.Lock()
		if k.absent {
			missing = append(missing, k.resource+"."+policy.Group)
		}
		k.mu.Unlock()
	}
	if len(missing) == 0 {
		return nil
	}
	return fmt.Errorf("the cluster has no definition of %s, so there can be no such policy; apply the files in deploy/crds", strings.Join(missing, ", "))
}

// run follows the kinds until ctx ends.
func (p *Policies) run(ctx context.Context) {
	var running sync.WaitGroup
	for _, k := range p.kinds {
		running.Go(func() { p.follow(ctx, k) })
	}
	for p.pacer.wait(ctx) {
		p.pacer.quiet(ctx)
		p.read()
	}
	running.Wait()
}

// follow finds the version that is served, and mirrors it for as long as it is.
func (p *Policies) follow(ctx context.Context, k *policyKind) {
	for ctx.Err() == nil {
		version, err := p.served(ctx, k)
		p.found(k, version, err)
		if version == "" {
			select {
			case <-ctx.Done():
			case <-time.After(lookAgain):
			}
			continue
		}
		following, stop := context.WithCancel(ctx)
		m := p.mirror(k, version, stop)
		k.mu.Lock()
		k.next, k.version = m, version
		k.mu.Unlock()
		m.run(following)
		stop()
	}
}

// found notes what the API server says about a kind.
func (p *Policies) found(k *policyKind, version string, err error) {
	k.mu.Lock()
	absent := err == nil && version == ""
	news := absent && !k.absent
	k.absent, k.failure = absent, err
	k.mu.Unlock()
	if news {
		p.cfg.Log.Warn("the cluster does not know this kind of policy; it is followed as soon as it does", slog.String("kind", k.kind))
		p.pacer.announce()
	}
}

// served returns the best version of a kind that the API server serves, "" if it
// certainly serves none.
func (p *Policies) served(ctx context.Context, k *policyKind) (string, error) {
	for _, version := range policyVersions() {
		list, err := p.resources(ctx, policy.Group+"/"+version)
		if apierrors.IsNotFound(err) {
			continue
		}
		if err != nil {
			return "", err
		}
		if slices.ContainsFunc(list.APIResources, func(r metav1.APIResource) bool { return r.Name == k.resource }) {
			return version, nil
		}
	}
	return "", nil
}

// resources asks what is served. The client's call knows no context: it ends by
// itself, and nobody waits for that.
func (p *Policies) resources(ctx context.Context, groupVersion string) (*metav1.APIResourceList, error) {
	type answer struct {
		list *metav1.APIResourceList
		err  error
	}
	got := make(chan answer, 1)
	go func() {
		list, err := p.cfg.Kubernetes.Discovery().ServerResourcesForGroupVersion(groupVersion)
		got <- answer{list, err}
	}()
	select {
	case a := <-got:
		return a.list, a.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// mirror makes the mirror of a kind; stop ends it when the kind is gone.
func (p *Policies) mirror(k *policyKind, version string, stop func()) *mirror {
	at := p.cfg.Dynamic.Resource(schema.GroupVersionResource{Group: policy.Group, Version: version, Resource: k.resource})
	m := &mirror{
		Indexer: cache.NewIndexer(cache.MetaNamespaceKeyFunc, cache.Indexers{}),
		name:    k.resource, reduce: reducePolicy,
		list: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			list, err := at.List(ctx, o)
			if err != nil {
				return nil, err // not a typed nil
			}
			return list, nil
		},
		open:       func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) { return at.Watch(ctx, o) },
		unstreamed: watchlist.DoesClientNotSupportWatchListSemantics(p.cfg.Dynamic),
		log:        p.cfg.Log, now: p.cfg.Now, missing: stop,
	}
	m.changed = append(m.changed, func(old, next metav1.Object) {
		k.mu.Lock()
		first := k.live != m
		k.live, k.next = m, nil
		k.mu.Unlock()
		before, _ := old.(*policyObject)
		after, _ := next.(*policyObject)
		if first || before == nil || after == nil || !before.says(after) {
			p.pacer.announce()
		}
	})
	return m
}

// read puts the objects of all kinds together.
func (p *Policies) read() {
	objects := []policy.Object{}
	for _, k := range p.kinds {
		k.mu.Lock()
		live, absent := k.live, k.absent
		k.mu.Unlock()
		if live == nil && !absent {
			return // not known yet
		}
		if live == nil {
			continue
		}
		for _, o := range live.List() {
			if po, ok := o.(*policyObject); ok {
				objects = append(objects, policy.Object{Kind: k.kind, Namespace: po.Namespace, Name: po.Name, UID: string(po.UID), Generation: po.Generation, JSON: po.json})
			}
		}
	}
	slices.SortFunc(objects, func(a, b policy.Object) int {
		return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
	p.mu.Lock()
	defer p.mu.Unlock()
	p.objects, p.known = objects, true
	close(p.changed)
	p.changed = make(chan struct{})
}

// lookup finds a policy and the version that its kind is read in.
func (p *Policies) lookup(kind, namespace, name string) (o *policyObject, at schema.GroupVersionResource, ok bool) {
	for _, k := range p.kinds {
		if k.kind != kind {
			continue
		}
		k.mu.Lock()
		live, version := k.live, k.version
		k.mu.Unlock()
		if live == nil {
			return nil, at, false
		}
		found, exists, err := live.GetByKey(namespace + "/" + name)
		if err != nil || !exists {
			return nil, at, false
		}
		o, ok = found.(*policyObject)
		return o, schema.GroupVersionResource{Group: policy.Group, Version: version, Resource: k.resource}, ok
	}
	return nil, at, false
}
