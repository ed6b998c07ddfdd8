package kube_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"path"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	"castellan.dev/identity"
	"castellan.dev/internal/kube"
)

// podView is a view whose content and age the test sets.
type podView struct {
	pods, accounts cache.Indexer
	unsynced       bool
	contact        func() time.Time
}

func (v *podView) Pods() cache.Indexer            { return v.pods }
func (v *podView) ServiceAccounts() cache.Indexer { return v.accounts }
func (v *podView) Synced() bool                   { return !v.unsynced }
func (v *podView) LastContact() time.Time         { return v.contact() }

// podScene is the view and the cluster behind it.
type podScene struct {
	*kube.Pods
	view    *podView
	cluster *fakeCluster
	now     time.Time
}

func newPodScene(t *testing.T) *podScene {
	t.Helper()
	byUID := func(o any) ([]string, error) { return []string{string(o.(metav1.Object).GetUID())}, nil }
	byNode := func(o any) ([]string, error) { return []string{o.(*corev1.Pod).Spec.NodeName}, nil }
	s := &podScene{cluster: newCluster(t), now: time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)}
	contact := s.now
	s.view = &podView{
		pods:     cache.NewIndexer(cache.MetaNamespaceKeyFunc, cache.Indexers{kube.IndexUID: byUID, kube.IndexNode: byNode}),
		accounts: cache.NewIndexer(cache.MetaNamespaceKeyFunc, cache.Indexers{}),
		contact:  func() time.Time { return contact },
	}
	var err error
	if s.Pods, err = kube.NewPods(s.view, s.cluster.client(), func() time.Time { return s.now }, prometheus.NewRegistry()); err != nil {
		t.Fatal(err)
	}
	return s
}

func pod(change ...func(*corev1.Pod)) *corev1.Pod {
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "orders-1", UID: "pod"},
		Spec:       corev1.PodSpec{NodeName: "node-a", ServiceAccountName: "orders"},
		Status:     corev1.PodStatus{Phase: corev1.PodRunning},
	}
	for _, c := range change {
		c(p)
	}
	return p
}

func serviceAccount(change ...func(*corev1.ServiceAccount)) *corev1.ServiceAccount {
	a := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "orders", UID: "sa"}}
	for _, c := range change {
		c(a)
	}
	return a
}

// sees puts objects into the informers' view, has into the API server.
func (s *podScene) sees(t *testing.T, objects ...metav1.Object) {
	t.Helper()
	for _, o := range objects {
		ix := s.view.pods
		if _, ok := o.(*corev1.ServiceAccount); ok {
			ix = s.view.accounts
		}
		if err := ix.Add(o); err != nil {
			t.Fatal(err)
		}
	}
}

func (s *podScene) has(t *testing.T, pods []*corev1.Pod, accounts ...*corev1.ServiceAccount) {
	t.Helper()
	for _, p := range pods {
		if err := s.cluster.Tracker().Add(p); err != nil {
			t.Fatal(err)
		}
	}
	for _, a := range accounts {
		if err := s.cluster.Tracker().Add(a); err != nil {
			t.Fatal(err)
		}
	}
}

func shopOrders(t testing.TB) identity.Account {
	t.Helper()
	a, err := identity.NewAccount("shop", "orders")
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func ordersRef(t testing.TB) kube.PodRef {
	return kube.PodRef{Namespace: "shop", Name: "orders-1", UID: "pod", Account: shopOrders(t), ServiceAccountUID: "sa"}
}

func live(t testing.TB) kube.Pod {
	return kube.Pod{Account: shopOrders(t), Name: "orders-1", UID: "pod", ServiceAccountUID: "sa", Node: "node-a"}
}

// TestKnownPodsCostNoCall: attestation of pods that informers know asks the API
// server nothing, however often.
func TestKnownPodsCostNoCall(t *testing.T) {
	s := newPodScene(t)
	s.sees(t, serviceAccount())
	for i := range 500 {
		s.sees(t, pod(func(p *corev1.Pod) { p.Name = fmt.Sprint("orders-", i); p.UID = types.UID(fmt.Sprint("pod-", i)) }))
	}
	for range 3 {
		for i := range 500 {
			ref := ordersRef(t)
			ref.Name, ref.UID = fmt.Sprint("orders-", i), fmt.Sprint("pod-", i)
			if p, err := s.Pod(t.Context(), ref); err != nil || p.UID != ref.UID || p.ServiceAccountUID != "sa" || p.Node != "node-a" {
				t.Fatal(p, err)
			}
		}
	}
	if n := s.cluster.count("", ""); n != 0 {
		t.Errorf("%d calls", n)
	}
}

// TestPodVerdicts: what the API server's own rule says of a pod and its account,
// whether the informers know them or have to ask.
func TestPodVerdicts(t *testing.T) {
	deleted := func(ago time.Duration) func(*corev1.Pod) {
		return func(p *corev1.Pod) {
			at := metav1.NewTime(time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC).Add(-ago))
			p.DeletionTimestamp = &at
		}
	}
	phase := func(ph corev1.PodPhase) func(*corev1.Pod) { return func(p *corev1.Pod) { p.Status.Phase = ph } }
	for name, tt := range map[string]struct {
		pod     *corev1.Pod
		account *corev1.ServiceAccount
		want    error
	}{
		"running":                     {pod(), serviceAccount(), nil},
		"pending":                     {pod(phase(corev1.PodPending)), serviceAccount(), nil},
		"unknown phase":               {pod(phase(corev1.PodUnknown)), serviceAccount(), nil},
		"succeeded":                   {pod(phase(corev1.PodSucceeded)), serviceAccount(), kube.ErrNoPod},
		"failed":                      {pod(phase(corev1.PodFailed)), serviceAccount(), kube.ErrNoPod},
		"to be deleted in 30 s":       {pod(deleted(-30 * time.Second)), serviceAccount(), nil},
		"deleted just now":            {pod(deleted(0)), serviceAccount(), nil},
		"deleted within the leeway":   {pod(deleted(time.Minute)), serviceAccount(), nil},
		"deleted beyond the leeway":   {pod(deleted(61 * time.Second)), serviceAccount(), kube.ErrNoPod},
		"no account":                  {pod(), nil, kube.ErrNoAccount},
		"account deleted long ago":    {pod(), serviceAccount(func(a *corev1.ServiceAccount) { a.DeletionTimestamp = pod(deleted(2 * time.Minute)).DeletionTimestamp }), kube.ErrNoAccount},
		"account being deleted":       {pod(), serviceAccount(func(a *corev1.ServiceAccount) { a.DeletionTimestamp = pod(deleted(0)).DeletionTimestamp }), nil},
		"no pod":                      {nil, serviceAccount(), kube.ErrNoPod},
		"another pod of that name":    {pod(func(p *corev1.Pod) { p.UID = "later" }), serviceAccount(), kube.ErrNoPod},
		"another, with its UID later": {pod(func(p *corev1.Pod) { p.UID = "pod-2" }), serviceAccount(), kube.ErrNoPod},
	} {
		for _, where := range []string{"known", "asked for"} {
			t.Run(name+", "+where, func(t *testing.T) {
				s := newPodScene(t)
				var pods []*corev1.Pod
				var accounts []*corev1.ServiceAccount
				if tt.pod != nil {
					pods = append(pods, tt.pod)
				}
				if tt.account != nil {
					accounts = append(accounts, tt.account)
				}
				s.has(t, pods, accounts...)
				if where == "known" {
					for _, p := range pods {
						s.sees(t, p)
					}
					for _, a := range accounts {
						s.sees(t, a)
					}
				}
				got, err := s.Pod(t.Context(), ordersRef(t))
				if !errors.Is(err, tt.want) || kube.MayPass(err) {
					t.Fatalf("%+v, %v; want %v", got, err, tt.want)
				}
				if tt.want == nil && got != live(t) {
					t.Errorf("%+v", got)
				}
			})
		}
	}
}

// TestMemoryMayBeBehind: what differs from a genuine token is asked of the API
// server before it counts against its bearer.
func TestMemoryMayBeBehind(t *testing.T) {
	t.Run("of the node", func(t *testing.T) {
		s := newPodScene(t)
		s.has(t, []*corev1.Pod{pod()}, serviceAccount())
		s.sees(t, serviceAccount(), pod(func(p *corev1.Pod) { p.Spec.NodeName = "" }))
		if got, err := s.Pod(t.Context(), ordersRef(t)); err != nil || got != live(t) {
			t.Fatal(got, err)
		}
	})
	t.Run("of the account", func(t *testing.T) {
		s := newPodScene(t)
		s.has(t, []*corev1.Pod{pod()}, serviceAccount())
		s.sees(t, pod(), serviceAccount(func(a *corev1.ServiceAccount) { a.UID = "earlier" }))
		if got, err := s.Pod(t.Context(), ordersRef(t)); err != nil || got != live(t) {
			t.Fatal(got, err)
		}
	})
	t.Run("of neither: the account was made anew", func(t *testing.T) {
		s := newPodScene(t)
		later := serviceAccount(func(a *corev1.ServiceAccount) { a.UID = "later" })
		s.has(t, []*corev1.Pod{pod()}, later)
		s.sees(t, pod(), later)
		if got, err := s.Pod(t.Context(), ordersRef(t)); err != nil || got.ServiceAccountUID != "later" {
			t.Fatal(got, err) // attestation compares, and refuses
		}
	})
	t.Run("a pod of another account", func(t *testing.T) {
		s := newPodScene(t)
		s.sees(t, pod(func(p *corev1.Pod) { p.Spec.ServiceAccountName = "payments" }))
		if got, err := s.Pod(t.Context(), ordersRef(t)); err != nil || got.Account.Name() != "payments" {
			t.Fatal(got, err) // likewise
		}
		if n := s.cluster.count("", ""); n != 0 {
			t.Errorf("%d calls for an account that is not the pod's", n)
		}
	})
}

// TestViewAges: with the API server away the last view counts for ten minutes; then,
// and for what is new, nothing is known. It is never a refusal.
func TestViewAges(t *testing.T) {
	s := newPodScene(t)
	s.sees(t, pod(), serviceAccount())
	s.cluster.setFail(func(string, string) error { return errors.New("connection refused") })
	for _, age := range []time.Duration{0, time.Minute, 10*time.Minute - time.Second} {
		s.now = s.view.contact().Add(age)
		if _, err := s.Pod(t.Context(), ordersRef(t)); err != nil {
			t.Errorf("after %v: %v", age, err)
		}
		if pods, err := s.OnNode(t.Context(), "node-a", shopOrders(t)); err != nil || len(pods) != 1 {
			t.Errorf("after %v: %v, %v", age, pods, err)
		}
		ref := ordersRef(t)
		ref.UID = "new"
		if _, err := s.Pod(t.Context(), ref); !kube.MayPass(err) {
			t.Errorf("new pod after %v: %v", age, err)
		}
	}
	for _, age := range []time.Duration{10 * time.Minute, 24 * time.Hour, -time.Hour} {
		s.now = s.view.contact().Add(age)
		if _, err := s.Pod(t.Context(), ordersRef(t)); !kube.MayPass(err) {
			t.Errorf("after %v: %v", age, err)
		}
		if _, err := s.OnNode(t.Context(), "node-a", shopOrders(t)); !kube.MayPass(err) {
			t.Errorf("after %v: %v", age, err)
		}
	}
	// The watch may be what is away, and not the API server.
	s.cluster.setFail(nil)
	s.has(t, []*corev1.Pod{pod()}, serviceAccount())
	s.now = s.view.contact().Add(time.Hour)
	if got, err := s.Pod(t.Context(), ordersRef(t)); err != nil || got != live(t) {
		t.Error(got, err)
	}
}

func TestNotListedYet(t *testing.T) {
	s := newPodScene(t)
	s.view.unsynced = true
	s.sees(t, pod(), serviceAccount())
	if _, err := s.Pod(t.Context(), ordersRef(t)); !kube.MayPass(err) {
		t.Error(err)
	}
	if _, err := s.OnNode(t.Context(), "node-a", shopOrders(t)); !kube.MayPass(err) {
		t.Error(err)
	}
}

func TestOnNode(t *testing.T) {
	s := newPodScene(t)
	at := func(name, uid, account, node string, phase corev1.PodPhase) *corev1.Pod {
		return pod(func(p *corev1.Pod) {
			p.Name, p.UID, p.Spec.ServiceAccountName, p.Spec.NodeName, p.Status.Phase = name, types.UID(uid), account, node, phase
		})
	}
	s.sees(t, serviceAccount(),
		at("b", "2", "orders", "node-a", corev1.PodRunning), at("a", "1", "orders", "node-a", corev1.PodRunning),
		at("c", "3", "orders", "node-b", corev1.PodRunning), at("d", "4", "payments", "node-a", corev1.PodRunning),
		at("e", "5", "orders", "node-a", corev1.PodSucceeded))
	got, err := s.OnNode(t.Context(), "node-a", shopOrders(t))
	if err != nil || len(got) != 2 || got[0].UID != "1" || got[1].UID != "2" {
		t.Fatal(got, err)
	}
	if err := s.view.accounts.Delete(serviceAccount()); err != nil {
		t.Fatal(err)
	}
	if got, err := s.OnNode(t.Context(), "node-a", shopOrders(t)); err != nil || len(got) != 0 {
		t.Error("of an account that is gone:", got, err)
	}
}

// slowAPI is an API server that has the pods of the given UIDs by name, and answers
// when it is let.
type slowAPI struct {
	pods  map[string]*corev1.Pod
	hold  chan struct{}
	asked atomic.Int32
	most  atomic.Int32
	at    atomic.Int32
}

func (a *slowAPI) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	a.asked.Add(1)
	n := a.at.Add(1)
	defer a.at.Add(-1)
	for m := a.most.Load(); n > m && !a.most.CompareAndSwap(m, n); m = a.most.Load() {
	}
	<-a.hold
	w.Header().Set("Content-Type", "application/json")
	p, ok := a.pods[path.Base(r.URL.Path)]
	if !ok {
		w.WriteHeader(http.StatusNotFound)
		_ = json.NewEncoder(w).Encode(metav1.Status{TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: "Failure", Reason: metav1.StatusReasonNotFound, Code: 404})
		return
	}
	p = p.DeepCopy()
	p.TypeMeta = metav1.TypeMeta{Kind: "Pod", APIVersion: "v1"}
	_ = json.NewEncoder(w).Encode(p)
}

// TestLookupsAreShared: who asks for the same pod at the same time shares a call; a
// pod that is certainly gone is not asked for again for a minute; the number of calls
// at once is bounded.
func TestLookupsAreShared(t *testing.T) {
	s := newPodScene(t)
	s.sees(t, serviceAccount())
	api := &slowAPI{pods: map[string]*corev1.Pod{"orders-1": pod()}, hold: make(chan struct{})}
	server := httptest.NewServer(api)
	defer server.Close()
	c, err := kube.New(&rest.Config{Host: server.URL}, namespace)
	if err != nil {
		t.Fatal(err)
	}
	if s.Pods, err = kube.NewPods(s.view, c, func() time.Time { return s.now }, nil); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	ask := func(ref kube.PodRef, want error) {
		wg.Go(func() {
			if _, err := s.Pod(t.Context(), ref); !errors.Is(err, want) {
				t.Error(err)
			}
		})
	}
	gone := func(i int) kube.PodRef {
		ref := ordersRef(t)
		ref.Name, ref.UID = fmt.Sprint("gone-", i), fmt.Sprint("gone-", i)
		return ref
	}
	for i := range 50 {
		for range 4 {
			ask(ordersRef(t), nil)
			ask(gone(i), kube.ErrNoPod)
		}
	}
	within30s(t, "calls at once", func() bool { return api.most.Load() == 16 })
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Pod(ctx, ordersRef(t)); !kube.MayPass(err) {
		t.Errorf("who gives up: %v", err)
	}
	close(api.hold)
	wg.Wait()
	if n := api.asked.Load(); n < 51 || n > 60 { // a straggler may come when the answer is given
		t.Errorf("%d calls for 51 pods", n)
	}
	if n := api.most.Load(); n != 16 {
		t.Errorf("%d calls at once", n)
	}
	before := api.asked.Load()
	for range 10 {
		if _, err := s.Pod(t.Context(), gone(0)); !errors.Is(err, kube.ErrNoPod) {
			t.Error(err)
		}
	}
	if n := api.asked.Load(); n != before {
		t.Error("a pod known to be gone was asked for")
	}
	s.now = s.now.Add(2 * time.Minute)
	if _, err := s.Pod(t.Context(), gone(0)); !errors.Is(err, kube.ErrNoPod) || api.asked.Load() != before+1 {
		t.Error(err)
	}
}

// within30s waits for something that others do.
func within30s(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !is(); {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within 30 s", what)
		}
		<-time.After(5 * time.Millisecond)
	}
}

// TestLookupsAreRateBounded: a flood of unknown pods waits, and ends as "not known".
func TestLookupsAreRateBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newPodScene(t)
		s.sees(t, serviceAccount())
		var wg sync.WaitGroup
		var gone, later atomic.Int32
		start := time.Now()
		for i := range 2000 {
			wg.Go(func() {
				ref := ordersRef(t)
				ref.UID = fmt.Sprint("gone-", i)
				switch _, err := s.Pod(t.Context(), ref); {
				case errors.Is(err, kube.ErrNoPod):
					gone.Add(1)
				case kube.MayPass(err) && strings.Contains(err.Error(), "too many are asked for"):
					later.Add(1)
				default:
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if n := s.cluster.count("get", "pods"); n > 200+5*100 || int(gone.Load()) != n || gone.Load()+later.Load() != 2000 {
			t.Errorf("%d calls, %d gone, %d later", n, gone.Load(), later.Load())
		}
		if d := time.Since(start); d > 6*time.Second {
			t.Errorf("it took %v", d)
		}
	})
}
