package kube

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/watchlist"
)

// Indexes of Pods and ServiceAccounts.
const (
	// IndexUID is by the object's UID.
	IndexUID = "uid"
	// IndexNode is by the node a pod is assigned to.
	IndexNode = "node"

	// indexService is EndpointSlices by "namespace/service".
	indexService = "service"
)

// InformersConfig configures Informers.
type InformersConfig struct {
	Kubernetes kubernetes.Interface
	Dynamic    dynamic.Interface
	Log        *slog.Logger
	Now        func() time.Time
}

// Informers follows everything the server must know of a cluster. What was heard
// last stays known while the API server is away; LastContact says for how long.
//
// RBAC: get, list, watch of pods, serviceaccounts, namespaces, services,
// endpointslices (discovery.k8s.io) and of the three kinds of security.istio.io.
type Informers struct {
	cfg                                             InformersConfig
	pods, accounts, namespaces, services, endpoints *mirror
	policies                                        *Policies
}

// NewInformers makes mirrors; nothing is asked before Run.
func NewInformers(cfg InformersConfig) (*Informers, error) {
	if cfg.Kubernetes == nil || cfg.Dynamic == nil {
		return nil, errors.New("kube: informers need clients")
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now //nolint:forbidigo // the default clock
	}
	i := &Informers{cfg: cfg, policies: newPolicies(cfg)}
	core, disc := cfg.Kubernetes.CoreV1(), cfg.Kubernetes.DiscoveryV1()
	unstreamed := watchlist.DoesClientNotSupportWatchListSemantics(cfg.Kubernetes)
	add := func(m *mirror, indexers cache.Indexers) *mirror {
		m.Indexer = cache.NewIndexer(cache.MetaNamespaceKeyFunc, indexers)
		m.unstreamed, m.log, m.now = unstreamed, cfg.Log, cfg.Now
		return m
	}
	i.pods = add(&mirror{name: "pods", sample: &corev1.Pod{}, reduce: reducePod,
		list: listing(core.Pods("").List), open: core.Pods("").Watch,
	}, cache.Indexers{IndexUID: byUID, IndexNode: byNode})
	i.accounts = add(&mirror{name: "serviceaccounts", sample: &corev1.ServiceAccount{}, reduce: reduceAccount,
		list: listing(core.ServiceAccounts("").List), open: core.ServiceAccounts("").Watch,
	}, cache.Indexers{IndexUID: byUID})
	i.namespaces = add(&mirror{name: "namespaces", sample: &corev1.Namespace{}, reduce: reduceNamespace,
		list: listing(core.Namespaces().List), open: core.Namespaces().Watch,
	}, cache.Indexers{})
	i.services = add(&mirror{name: "services", sample: &corev1.Service{}, reduce: reduceService,
		list: listing(core.Services("").List), open: core.Services("").Watch,
	}, cache.Indexers{})
	i.endpoints = add(&mirror{name: "endpointslices", sample: &discoveryv1.EndpointSlice{}, reduce: reduceSlice,
		list: listing(disc.EndpointSlices("").List), open: disc.EndpointSlices("").Watch,
	}, cache.Indexers{indexService: byService})
	return i, nil
}

// listing drops the static type of a list.
func listing[L runtime.Object](list func(context.Context, metav1.ListOptions) (L, error)) func(context.Context, metav1.ListOptions) (runtime.Object, error) {
	return func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
		l, err := list(ctx, o)
		if err != nil {
			return nil, err // not a typed nil
		}
		return l, nil
	}
}

func (i *Informers) core() []*mirror {
	return []*mirror{i.pods, i.accounts, i.namespaces, i.services, i.endpoints}
}

// Run follows the API server until ctx ends. It is called once.
func (i *Informers) Run(ctx context.Context) error {
	var running sync.WaitGroup
	for _, m := range i.core() {
		running.Go(func() { m.run(ctx) })
	}
	running.Go(func() { i.policies.run(ctx) })
	running.Wait()
	return nil
}

// Policies are the policies of the cluster.
func (i *Informers) Policies() *Policies { return i.policies }

// Pods holds *corev1.Pod with the indexes IndexUID and IndexNode:
// metadata (name, namespace, UID, labels, deletion time, resource version),
// spec.{nodeName, serviceAccountName, hostNetwork}, names and ports of containers,
// CSI volumes of ours, status.{phase, podIP, podIPs, the condition Ready}. The
// objects must not be changed.
func (i *Informers) Pods() cache.Indexer { return i.pods.Indexer }

// ServiceAccounts holds *corev1.ServiceAccount with the index IndexUID: name,
// namespace, UID. The objects must not be changed.
func (i *Informers) ServiceAccounts() cache.Indexer { return i.accounts.Indexer }

// Synced reports whether all of it but policies has been listed once. Before, that
// something is not there says nothing.
func (i *Informers) Synced() bool {
	for _, m := range i.core() {
		if !m.synced.Load() {
			return false
		}
	}
	return true
}

// Ready returns nil once Synced, and else what is missing.
func (i *Informers) Ready() error {
	for _, m := range i.core() {
		if m.synced.Load() {
			continue
		}
		if err := m.problem(); err != nil {
			return fmt.Errorf("kubernetes: %s cannot be listed: %w", m.name, err)
		}
		return fmt.Errorf("kubernetes: %s have not been listed yet", m.name)
	}
	return nil
}

// LastContact is when pods and service accounts were known to be followed last:
// the API server has said something about each since. Zero before Synced.
func (i *Informers) LastContact() time.Time {
	if !i.Synced() {
		return time.Time{}
	}
	return time.Unix(0, min(i.pods.contact.Load(), i.accounts.contact.Load()))
}

// Labels returns a namespace's labels; false if there is no such namespace. They
// must not be changed.
func (i *Informers) Labels(namespace string) (map[string]string, bool) {
	obj, ok, err := i.namespaces.GetByKey(namespace)
	if err != nil || !ok {
		return nil, false
	}
	ns, ok := obj.(*corev1.Namespace)
	if !ok {
		return nil, false
	}
	return ns.Labels, true
}
