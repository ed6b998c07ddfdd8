package install_test

import (
	"context"
	"encoding/json"
	"strings"
	"sync"
	"testing"
	"time"

	authorizationv1 "k8s.io/api/authorization/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/version"
	fakediscovery "k8s.io/client-go/discovery/fake"
	dynamicfake "k8s.io/client-go/dynamic/fake"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"castellan.dev/internal/install"
)

// fakeCluster is an API server in memory, as far as the installer needs one.
type fakeCluster struct {
	dynamic *dynamicfake.FakeDynamicClient
	typed   *fake.Clientset

	mu sync.Mutex
	// said is what the installer told of.
	said []string
	// denied are "verb resource" that the caller may not.
	denied map[string]bool
}

var configMaps = schema.GroupVersionResource{Version: "v1", Resource: "configmaps"}

var listKinds = map[schema.GroupVersionResource]string{
	{Group: "security.istio.io", Version: "v1", Resource: "authorizationpolicies"}:  "AuthorizationPolicyList",
	{Group: "security.istio.io", Version: "v1", Resource: "requestauthentications"}: "RequestAuthenticationList",
	{Group: "security.istio.io", Version: "v1", Resource: "peerauthentications"}:    "PeerAuthenticationList",
}

// newCluster holds typed objects where the installer reads them typed, and
// unstructured ones where it does not.
func newCluster(t testing.TB, objects ...runtime.Object) *fakeCluster {
	t.Helper()
	c := &fakeCluster{denied: map[string]bool{}}
	var typed, untyped []runtime.Object
	for _, o := range objects {
		if _, ok := o.(*unstructured.Unstructured); ok {
			untyped = append(untyped, o)
		} else {
			typed = append(typed, o)
		}
	}
	c.dynamic = dynamicfake.NewSimpleDynamicClientWithCustomListKinds(runtime.NewScheme(), listKinds, untyped...)
	c.dynamic.PrependReactor("patch", "*", c.applied)
	c.typed = fake.NewClientset(typed...)
	c.version("v1.36.3")
	c.typed.PrependReactor("create", "selfsubjectaccessreviews", func(action clienttesting.Action) (bool, runtime.Object, error) {
		review := action.(clienttesting.CreateAction).GetObject().(*authorizationv1.SelfSubjectAccessReview).DeepCopy()
		a := review.Spec.ResourceAttributes
		review.Status.Allowed = !c.denied[a.Verb+" "+a.Resource]
		return true, review, nil
	})
	return c
}

func (c *fakeCluster) version(v string) {
	c.typed.Discovery().(*fakediscovery.FakeDiscovery).FakedServerVersion = &version.Info{GitVersion: v}
}

// applied does what the API server does with an apply, without its book-keeping of
// who owns which field: what is not mentioned stays.
func (c *fakeCluster) applied(action clienttesting.Action) (bool, runtime.Object, error) {
	patch := action.(clienttesting.PatchAction)
	if patch.GetPatchType() != types.ApplyPatchType {
		return false, nil, nil
	}
	var next map[string]any
	if err := json.Unmarshal(patch.GetPatch(), &next); err != nil {
		return true, nil, err
	}
	tracker := c.dynamic.Tracker()
	gvr, ns := action.GetResource(), action.GetNamespace()
	live, err := tracker.Get(gvr, ns, patch.GetName())
	if apierrors.IsNotFound(err) {
		o := &unstructured.Unstructured{Object: next}
		if o.GetKind() == "CustomResourceDefinition" {
			o.Object["status"] = map[string]any{"conditions": []any{map[string]any{"type": "Established", "status": "True"}}}
		}
		return true, o, tracker.Create(gvr, o, ns)
	}
	if err != nil {
		return true, nil, err
	}
	o := &unstructured.Unstructured{Object: merge(live.(*unstructured.Unstructured).Object, next).(map[string]any)}
	return true, o, tracker.Update(gvr, o, ns)
}

// merge puts what b says over a; lists of named things by name.
func merge(a, b any) any {
	am, aok := a.(map[string]any)
	bm, bok := b.(map[string]any)
	if aok && bok {
		out := map[string]any{}
		for k, v := range am {
			out[k] = v
		}
		for k, v := range bm {
			out[k] = merge(out[k], v)
		}
		return out
	}
	al, aok := a.([]any)
	bl, bok := b.([]any)
	if !aok || !bok {
		return b
	}
	var out []any
	for _, v := range bl {
		for _, w := range al {
			wm, _ := w.(map[string]any)
			if vm, ok := v.(map[string]any); ok && vm["name"] != nil && vm["name"] == wm["name"] {
				v = merge(w, v)
			}
		}
		out = append(out, v)
	}
	return out
}

func (c *fakeCluster) installer(t testing.TB) *install.Installer {
	t.Helper()
	in, err := install.New(install.Config{
		Dynamic: c.dynamic, Kubernetes: c.typed, Poll: time.Millisecond,
		Progress: func(line string) {
			c.mu.Lock()
			defer c.mu.Unlock()
			c.said = append(c.said, line)
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	return in
}

func (c *fakeCluster) heard() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return strings.Join(c.said, "\n")
}

// get reads an object of a resource; nil where there is none.
func (c *fakeCluster) get(t testing.TB, group, resource, ns, name string) *unstructured.Unstructured {
	t.Helper()
	client := c.dynamic.Resource(schema.GroupVersionResource{Group: group, Version: "v1", Resource: resource})
	var o *unstructured.Unstructured
	var err error
	if ns == "" {
		o, err = client.Get(context.Background(), name, metav1.GetOptions{})
	} else {
		o, err = client.Namespace(ns).Get(context.Background(), name, metav1.GetOptions{})
	}
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		t.Fatal(err)
	}
	return o
}

// put writes an object over what is there, as somebody else would.
func (c *fakeCluster) put(t testing.TB, resource string, o *unstructured.Unstructured) {
	t.Helper()
	group := o.GroupVersionKind().Group
	gvr := schema.GroupVersionResource{Group: group, Version: "v1", Resource: resource}
	err := c.dynamic.Tracker().Update(gvr, o, o.GetNamespace())
	if apierrors.IsNotFound(err) {
		err = c.dynamic.Tracker().Create(gvr, o, o.GetNamespace())
	}
	if err != nil {
		t.Fatal(err)
	}
}

// writes are "verb resource name" of what changed something, in order.
func (c *fakeCluster) writes() []string {
	var out []string
	for _, a := range c.dynamic.Actions() {
		name := ""
		switch a := a.(type) {
		case clienttesting.PatchAction:
			name = a.GetName()
		case clienttesting.DeleteAction:
			name = a.GetName()
		default:
			continue
		}
		out = append(out, a.GetVerb()+" "+a.GetResource().Resource+" "+name)
	}
	return out
}

func object(apiVersion, kind, ns, name string, fields map[string]any) *unstructured.Unstructured {
	o := &unstructured.Unstructured{Object: map[string]any{"apiVersion": apiVersion, "kind": kind}}
	for k, v := range fields {
		o.Object[k] = v
	}
	o.SetName(name)
	if ns != "" {
		o.SetNamespace(ns)
	}
	return o
}
