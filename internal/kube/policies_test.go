package kube_test

import (
	"encoding/json"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	dynamicfake "k8s.io/client-go/dynamic/fake"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"castellan.dev/api/policy"
	"castellan.dev/internal/kube"
)

// policyCluster is a cluster of fakes that serves some versions of policies.
type policyCluster struct {
	t         *testing.T
	dynamic   *dynamicfake.FakeDynamicClient
	informers *kube.Informers
	opened    *atomic.Int32

	mu     sync.Mutex
	serves string // a version, or "" for none
	broken error
}

func (c *policyCluster) serve(version string, broken error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.serves, c.broken = version, broken
}

func resources(version string) []*metav1.APIResourceList {
	return []*metav1.APIResourceList{{GroupVersion: policy.Group + "/" + version, APIResources: []metav1.APIResource{
		{Name: "authorizationpolicies"}, {Name: "peerauthentications"}, {Name: "requestauthentications"}}}}
}

func listKinds() map[schema.GroupVersionResource]string {
	kinds := map[schema.GroupVersionResource]string{}
	for _, version := range []string{"v1", "v1beta1"} {
		for resource, kind := range map[string]string{"authorizationpolicies": "AuthorizationPolicy", "peerauthentications": "PeerAuthentication", "requestauthentications": "RequestAuthentication"} {
			kinds[schema.GroupVersionResource{Group: policy.Group, Version: version, Resource: resource}] = kind + "List"
		}
	}
	return kinds
}

func newPolicyCluster(t *testing.T, version string, objects ...runtime.Object) *policyCluster {
	t.Helper()
	c := &policyCluster{t: t, serves: version, dynamic: dynamicfake.NewSimpleDynamicClientWithCustomListKinds(runtime.NewScheme(), listKinds(), objects...)}
	client := fake.NewClientset()
	client.Resources = append(resources("v1"), resources("v1beta1")...)
	client.PrependReactor("get", "resource", func(clienttesting.Action) (bool, runtime.Object, error) {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.broken != nil {
			return true, nil, c.broken
		}
		if c.serves == "" {
			return true, nil, apierrors.NewNotFound(schema.GroupResource{}, "")
		}
		return false, nil, nil
	})
	c.dynamic.PrependReactor("list", "*", func(a clienttesting.Action) (bool, runtime.Object, error) {
		c.mu.Lock()
		defer c.mu.Unlock()
		if a.GetResource().Version != c.serves {
			return true, nil, apierrors.NewNotFound(schema.GroupResource{}, "")
		}
		return false, nil, nil
	})
	c.opened = watchCount(c.dynamic, c.dynamic.Tracker())
	var err error
	if c.informers, err = kube.NewInformers(kube.InformersConfig{Kubernetes: client, Dynamic: c.dynamic}); err != nil {
		t.Fatal(err)
	}
	return c
}

func (c *policyCluster) names() string {
	objects, _ := c.informers.Policies().Objects()
	if objects == nil {
		return "unknown"
	}
	var names []string
	for _, o := range objects {
		names = append(names, o.Kind+" "+o.Namespace+"/"+o.Name)
	}
	return strings.Join(names, ", ")
}

func authorization(name string) *unstructured.Unstructured {
	return &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
		"metadata": map[string]any{"namespace": "shop", "name": name, "uid": "uid-" + name, "generation": int64(3), "resourceVersion": "9",
			"creationTimestamp": "2026-01-02T03:04:05Z", "labels": map[string]any{"team": "a"},
			"annotations":   map[string]any{"istio.io/dry-run": "true", "kubectl.kubernetes.io/last-applied-configuration": "{}"},
			"managedFields": []any{map[string]any{"manager": "kubectl"}}},
		"spec":   map[string]any{"action": "DENY", "rules": []any{map[string]any{}}},
		"status": map[string]any{"conditions": []any{map[string]any{"type": "Other"}}},
	}}
}

func TestPolicies(t *testing.T) {
	c := newPolicyCluster(t, "v1", authorization("one"))
	policies := c.informers.Policies()
	if policies.Ready() == nil || c.names() != "unknown" {
		t.Error("something is known before Run")
	}
	background(t, c.informers.Run)
	eventually(t, "the first policy", func() bool { return c.names() == "AuthorizationPolicy shop/one" && c.opened.Load() >= 3 })
	if err := errors.Join(policies.Ready(), policies.Missing()); err != nil {
		t.Error(err)
	}
	objects, changed := policies.Objects()
	o := objects[0]
	want := `{"apiVersion":"security.istio.io/v1","kind":"AuthorizationPolicy","metadata":{"annotations":{"istio.io/dry-run":"true"},"creationTimestamp":"2026-01-02T03:04:05Z",` +
		`"generation":3,"labels":{"team":"a"},"name":"one","namespace":"shop","uid":"uid-one"},"spec":{"action":"DENY","rules":[{}]}}`
	if string(o.JSON) != want || o.UID != "uid-one" || o.Generation != 3 {
		t.Errorf("%+v: %s", o, o.JSON)
	}
	at := c.dynamic.Resource(schema.GroupVersionResource{Group: policy.Group, Version: "v1", Resource: "authorizationpolicies"}).Namespace("shop")
	// Its status is of no concern to proxies.
	other := authorization("one")
	other.Object["status"] = map[string]any{"conditions": []any{}}
	other.SetResourceVersion("10")
	if _, err := at.Update(t.Context(), other, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := at.Create(t.Context(), authorization("two"), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	<-changed
	if got := c.names(); got != "AuthorizationPolicy shop/one, AuthorizationPolicy shop/two" {
		t.Error(got)
	}
	if err := at.Delete(t.Context(), "one", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "deletion", func() bool { return c.names() == "AuthorizationPolicy shop/two" })
}

func TestPoliciesWithoutDefinitions(t *testing.T) {
	c := newPolicyCluster(t, "")
	c.serve("", errors.New("connection refused"))
	background(t, c.informers.Run)
	policies := c.informers.Policies()
	eventually(t, "that the API server is away", func() bool {
		err := policies.Ready()
		return err != nil && strings.Contains(err.Error(), "connection refused")
	})
	if c.names() != "unknown" || policies.Missing() != nil {
		t.Errorf("an API server that cannot be asked has said %s, %v", c.names(), policies.Missing())
	}
	c.serve("", nil)
	eventually(t, "that there are no definitions", func() bool { return policies.Ready() == nil && c.names() == "" })
	if err := policies.Missing(); err == nil || !strings.Contains(err.Error(), "no definition of authorizationpolicies.security.istio.io") {
		t.Errorf("missing: %v", err)
	}
	at := c.dynamic.Resource(schema.GroupVersionResource{Group: policy.Group, Version: "v1", Resource: "authorizationpolicies"}).Namespace("shop")
	if _, err := at.Create(t.Context(), authorization("one"), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	c.serve("v1", nil)
	eventually(t, "the definitions", func() bool { return c.names() == "AuthorizationPolicy shop/one" && policies.Missing() == nil })
}

// TestPoliciesOfAnOlderVersion: v1beta1 is read where there is no v1.
func TestPoliciesOfAnOlderVersion(t *testing.T) {
	old := authorization("one")
	old.SetAPIVersion("security.istio.io/v1beta1")
	client := fake.NewClientset()
	client.Resources = resources("v1beta1")
	i, err := kube.NewInformers(kube.InformersConfig{Kubernetes: client,
		Dynamic: dynamicfake.NewSimpleDynamicClientWithCustomListKinds(runtime.NewScheme(), listKinds(), old)})
	if err != nil {
		t.Fatal(err)
	}
	background(t, i.Run)
	eventually(t, "the policy", func() bool { objects, _ := i.Policies().Objects(); return len(objects) == 1 })
	objects, _ := i.Policies().Objects()
	var o struct{ APIVersion string }
	if err := json.Unmarshal(objects[0].JSON, &o); err != nil || o.APIVersion != "security.istio.io/v1beta1" {
		t.Errorf("%s, %v", objects[0].JSON, err)
	}
}
