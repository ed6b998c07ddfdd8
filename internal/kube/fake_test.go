package kube_test

import (
	"context"
	"encoding/json"
	"errors"
	"strconv"
	"sync"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
	k8stesting "k8s.io/client-go/testing"

	"castellan.dev/internal/kube"
	"castellan.dev/internal/run"
)

const namespace = "castellan-system"

// fakeCluster is client-go's fake with what it leaves out and the tests need: UIDs,
// resource versions that rise, and conflicts.
type fakeCluster struct {
	*fake.Clientset
	*kube.Client
	mu      sync.Mutex
	version int
	calls   []string
	// fail, if set, is asked about every call first.
	fail func(verb, resource string) error
}

func newCluster(t testing.TB, objects ...runtime.Object) *fakeCluster {
	t.Helper()
	c := &fakeCluster{Clientset: fake.NewClientset()}
	c.Client = kube.Wrap(c.Clientset, nil, namespace)
	c.PrependReactor("*", "*", c.react)
	for _, o := range objects {
		c.identify(t, o)
		if err := c.Tracker().Add(o); err != nil {
			t.Fatal(err)
		}
	}
	return c
}

// client is the client under test; both embedded have its methods.
func (c *fakeCluster) client() *kube.Client { return c.Client }

func (c *fakeCluster) identify(t testing.TB, o runtime.Object) {
	t.Helper()
	m, err := meta.Accessor(o)
	if err != nil {
		t.Fatal(err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.version++
	m.SetResourceVersion(strconv.Itoa(c.version))
	if m.GetUID() == "" {
		m.SetUID(types.UID("uid-" + strconv.Itoa(c.version)))
	}
}

// setFail makes calls fail as f says; nil ends it.
func (c *fakeCluster) setFail(f func(verb, resource string) error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.fail = f
}

// count returns how many calls of a verb there were; "" counts all.
func (c *fakeCluster) count(verb, resource string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := 0
	for _, call := range c.calls {
		if verb == "" || call == verb+" "+resource {
			n++
		}
	}
	return n
}

func (c *fakeCluster) react(action k8stesting.Action) (bool, runtime.Object, error) {
	verb, resource := action.GetVerb(), action.GetResource().Resource
	c.mu.Lock()
	defer c.mu.Unlock()
	c.calls = append(c.calls, verb+" "+resource)
	if c.fail != nil {
		if err := c.fail(verb, resource); err != nil {
			return true, nil, err
		}
	}
	if update, ok := action.(k8stesting.UpdateAction); ok && verb == "update" {
		m, err := meta.Accessor(update.GetObject())
		if err != nil {
			return true, nil, err
		}
		current, err := c.Tracker().Get(action.GetResource(), action.GetNamespace(), m.GetName())
		if err != nil {
			return true, nil, err
		}
		have, err := meta.Accessor(current)
		if err != nil {
			return true, nil, err
		}
		if m.GetResourceVersion() != "" && m.GetResourceVersion() != have.GetResourceVersion() {
			return true, nil, apierrors.NewConflict(action.GetResource().GroupResource(), m.GetName(), nil)
		}
		c.version++
		m.SetUID(have.GetUID())
		m.SetResourceVersion(strconv.Itoa(c.version))
	}
	if patch, ok := action.(k8stesting.PatchAction); ok && patch.GetSubresource() == "" {
		return c.patch(patch)
	}
	if create, ok := action.(k8stesting.CreateAction); ok && verb == "create" && action.GetSubresource() == "" {
		if m, err := meta.Accessor(create.GetObject()); err == nil {
			c.version++
			m.SetUID(types.UID("uid-" + strconv.Itoa(c.version)))
			m.SetResourceVersion(strconv.Itoa(c.version))
		}
	}
	return false, nil, nil
}

// named is the metadata of an object of the server's namespace.
func named(name string) metav1.ObjectMeta {
	return metav1.ObjectMeta{Namespace: namespace, Name: name}
}

// patch does what the fake leaves out: a patch that names another resource version is
// in conflict, and one that is not makes a new version.
func (c *fakeCluster) patch(action k8stesting.PatchAction) (bool, runtime.Object, error) {
	current, err := c.Tracker().Get(action.GetResource(), action.GetNamespace(), action.GetName())
	if err != nil {
		return true, nil, err
	}
	m, err := meta.Accessor(current)
	if err != nil {
		return true, nil, err
	}
	want := m.GetResourceVersion()
	switch action.GetPatchType() {
	case types.JSONPatchType:
		var ops []struct {
			Path  string
			Value any
		}
		err = json.Unmarshal(action.GetPatch(), &ops)
		for _, o := range ops {
			if o.Path == "/metadata/resourceVersion" {
				want, _ = o.Value.(string)
			}
		}
	default:
		var p struct {
			Metadata struct{ ResourceVersion string }
		}
		if err = json.Unmarshal(action.GetPatch(), &p); err == nil && p.Metadata.ResourceVersion != "" {
			want = p.Metadata.ResourceVersion
		}
	}
	if err != nil {
		return true, nil, err
	}
	if want != m.GetResourceVersion() {
		return true, nil, apierrors.NewConflict(action.GetResource().GroupResource(), action.GetName(), nil)
	}
	_, patched, err := k8stesting.ObjectReaction(c.Tracker())(action)
	if err != nil {
		return true, nil, err
	}
	if m, err = meta.Accessor(patched); err != nil {
		return true, nil, err
	}
	c.version++
	m.SetResourceVersion(strconv.Itoa(c.version))
	return true, patched, c.Tracker().Update(action.GetResource(), patched, action.GetNamespace())
}

// startPart runs a part until the returned function is called, which returns what it ended with.
func startPart(t *testing.T, part run.Part) (stop func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- part(ctx) }()
	stop = sync.OnceValue(func() error {
		cancel()
		if err := <-done; err != nil && !errors.Is(err, context.Canceled) {
			return err
		}
		return nil
	})
	t.Cleanup(func() { _ = stop() })
	return stop
}

func emptySecret() *corev1.Secret {
	return &corev1.Secret{ObjectMeta: named("castellan-ca"), Type: corev1.SecretTypeOpaque}
}
