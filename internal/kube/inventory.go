package kube

import (
	"context"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"castellan.dev/internal/workloads"
)

const defaultClusterDomain = "cluster.local"

// InventoryConfig configures an Inventory.
type InventoryConfig struct {
	Informers *Informers
	// ClusterDomain is what the names of services end with; default cluster.local.
	ClusterDomain string
	Log           *slog.Logger
	Now           func() time.Time
}

// Inventory keeps the cluster's pods and services as a *workloads.File. Every
// change makes a new one, of which only what has changed is made anew. An object
// that cannot be represented is left out with a line in the log, and never keeps
// the others from being seen.
type Inventory struct {
	cfg   InventoryConfig
	pacer pacer

	mu      sync.Mutex
	dirty   changes
	file    *workloads.File
	changed chan struct{}

	// All below belongs to Run's goroutine.
	complaints
	pods     podSet
	services map[string]*service // by namespace/name
	spaces   map[string]*space
	// users are the services with an endpoint at an address.
	users    map[string]users
	revision uint64
}

// service is one service of the cluster as it was converted last.
type service struct {
	key    string
	object *corev1.Service
	// beyond: older services of the namespace use up its share, and this one is as if
	// it were not there.
	beyond bool
	// declaring is the version that the selection goes by, nil for none.
	declaring *corev1.Service
	selection *selection
	outlined  *corev1.Service // what outline is of
	outline   outline
	places    int // that slices list
	// cut: the namespace's share leaves it no endpoints, and nobody to expect.
	cut     bool
	listed  []place
	dropped string // of what is listed
	made    *workloads.Service
}

// changes are what must be looked at again.
type changes struct {
	pods map[string]bool // UIDs
	// services, by namespace/name: whether more than pods of theirs has changed.
	services map[string]bool
}

func noChanges() changes { return changes{pods: map[string]bool{}, services: map[string]bool{}} }

// NewInventory subscribes to the informers; call it before they run.
func NewInventory(cfg InventoryConfig) *Inventory {
	if cfg.ClusterDomain == "" {
		cfg.ClusterDomain = defaultClusterDomain
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now //nolint:forbidigo // the default clock
	}
	inv := &Inventory{cfg: cfg, complaints: newComplaints(cfg.Log, cfg.Now), pacer: newPacer(), dirty: noChanges(), changed: make(chan struct{}),
		pods: newPodSet(), services: map[string]*service{}, spaces: map[string]*space{}, users: map[string]users{}}
	i := cfg.Informers
	i.pods.changed = append(i.pods.changed, inv.podChanged)
	i.services.changed = append(i.services.changed, inv.serviceChanged)
	i.endpoints.changed = append(i.endpoints.changed, inv.sliceChanged)
	for _, m := range []*mirror{i.accounts, i.namespaces} {
		m.changed = append(m.changed, func(_, _ metav1.Object) { inv.announceFirst() })
	}
	return inv
}

// Current returns the cluster as it was seen last, nil until all of it has been.
func (inv *Inventory) Current() *workloads.File {
	inv.mu.Lock()
	defer inv.mu.Unlock()
	return inv.file
}

// Changed returns a channel that is closed at the next change of Current. Take it
// before Current, so that no change is missed.
func (inv *Inventory) Changed() <-chan struct{} {
	inv.mu.Lock()
	defer inv.mu.Unlock()
	return inv.changed
}

// Run makes readings until ctx ends.
func (inv *Inventory) Run(ctx context.Context) error {
	for inv.pacer.wait(ctx) {
		if !inv.cfg.Informers.Synced() {
			continue // whatever is still missing announces itself
		}
		inv.pacer.quiet(ctx)
		inv.update()
	}
	return nil
}

// announceFirst is for kinds that only count until everything is known once.
func (inv *Inventory) announceFirst() {
	if inv.Current() == nil {
		inv.pacer.announce()
	}
}

func (inv *Inventory) podChanged(old, next metav1.Object) {
	before, _ := old.(*corev1.Pod)
	after, _ := next.(*corev1.Pod)
	if before != nil && after != nil && samePod(before, after) {
		return
	}
	inv.note(func(c *changes) {
		if before != nil {
			c.pods[string(before.UID)] = true
		}
		if after != nil {
			c.pods[string(after.UID)] = true
		}
	})
}

// samePod reports whether nothing has changed that a workload is made of: most of
// what happens to a pod are its conditions.
func samePod(a, b *corev1.Pod) bool {
	return a.UID == b.UID && live(a) == live(b) && a.Spec.NodeName == b.Spec.NodeName &&
		a.Spec.ServiceAccountName == b.Spec.ServiceAccountName && a.Spec.HostNetwork == b.Spec.HostNetwork &&
		maps.Equal(a.Labels, b.Labels) && slices.Equal(addresses(a), addresses(b))
}

func (inv *Inventory) serviceChanged(old, next metav1.Object) {
	inv.note(func(c *changes) {
		for _, o := range []metav1.Object{old, next} {
			if o != nil {
				c.services[o.GetNamespace()+"/"+o.GetName()] = true
			}
		}
	})
}

func (inv *Inventory) sliceChanged(old, next metav1.Object) {
	before, _ := old.(*discoveryv1.EndpointSlice)
	after, _ := next.(*discoveryv1.EndpointSlice)
	inv.note(func(c *changes) {
		for _, s := range []*discoveryv1.EndpointSlice{before, after} {
			if s != nil && s.Labels[discoveryv1.LabelServiceName] != "" {
				c.services[s.Namespace+"/"+s.Labels[discoveryv1.LabelServiceName]] = true
			}
		}
	})
}

func (inv *Inventory) note(add func(*changes)) {
	inv.mu.Lock()
	add(&inv.dirty)
	inv.mu.Unlock()
	inv.pacer.announce()
}

// update makes the next reading.
func (inv *Inventory) update() {
	inv.mu.Lock()
	c := inv.dirty
	inv.dirty = noChanges()
	first := inv.file == nil
	inv.mu.Unlock()

	u := newUpdate(inv, c)
	if !u.run() && !first {
		return
	}
	file := inv.reading()
	inv.mu.Lock()
	defer inv.mu.Unlock()
	inv.file = file
	close(inv.changed)
	inv.changed = make(chan struct{})
}

// reading puts a File together, in an order that hangs on names alone.
func (inv *Inventory) reading() *workloads.File {
	file := &workloads.File{Resolved: true, Workloads: make([]workloads.Workload, 0, len(inv.pods.byUID))}
	for _, c := range inv.pods.byUID {
		file.Workloads = append(file.Workloads, *c.Workload)
	}
	slices.SortFunc(file.Workloads, func(a, b workloads.Workload) int {
		if d := strings.Compare(a.Namespace, b.Namespace); d != 0 {
			return d
		}
		if d := strings.Compare(a.PodName, b.PodName); d != 0 {
			return d
		}
		return strings.Compare(a.PodUID, b.PodUID)
	})
	for _, s := range inv.services {
		if s.made != nil {
			file.Services = append(file.Services, *s.made)
		}
	}
	slices.SortFunc(file.Services, func(a, b workloads.Service) int {
		if d := strings.Compare(a.Namespace, b.Namespace); d != 0 {
			return d
		}
		return strings.Compare(a.Name, b.Name)
	})
	return file
}

// Matching counts the workloads of the mesh with all these labels in a namespace,
// or with "" in any. Before everything is known there are none.
func (inv *Inventory) Matching(namespace string, labels map[string]string) int {
	file := inv.Current()
	if file == nil {
		return 0
	}
	n := 0
	for i := range file.Workloads {
		w := &file.Workloads[i]
		if w.OutsideMesh || namespace != "" && w.Namespace != namespace {
			continue
		}
		if hasLabels(w.Labels, labels) {
			n++
		}
	}
	return n
}

func hasLabels(have, wanted map[string]string) bool {
	for k, v := range wanted {
		if got, ok := have[k]; !ok || got != v {
			return false
		}
	}
	return true
}

func sameWorkload(a, b *workloads.Workload) bool {
	return a.Namespace == b.Namespace && a.ServiceAccount == b.ServiceAccount && a.PodUID == b.PodUID && a.PodName == b.PodName &&
		a.Node == b.Node && a.Address == b.Address && a.OutsideMesh == b.OutsideMesh &&
		maps.Equal(a.Labels, b.Labels) && slices.Equal(a.Ports, b.Ports) && slices.Equal(a.Addresses, b.Addresses)
}

func sameService(a, b *workloads.Service) bool {
	if a == nil || b == nil {
		return a == b
	}
	return slices.Equal(a.Hosts, b.Hosts) && slices.Equal(a.Addresses, b.Addresses) && slices.Equal(a.Ports, b.Ports) &&
		slices.Equal(a.SubjectAltNames, b.SubjectAltNames) && slices.Equal(a.Accounts, b.Accounts) &&
		slices.EqualFunc(a.Endpoints, b.Endpoints, func(x, y workloads.Endpoint) bool {
			return x.Workload == y.Workload && x.Address == y.Address && x.OutsideMesh == y.OutsideMesh && maps.Equal(x.Ports, y.Ports)
		})
}
