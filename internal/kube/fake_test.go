package kube_test

import (
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

func emptySecret() *corev1.Secret {
	return &corev1.Secret{ObjectMeta: named("castellan-ca"), Type: corev1.SecretTypeOpaque}
}
