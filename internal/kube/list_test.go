package kube_test

import (
	"errors"
	"slices"
	"strings"
	"testing"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	dynamicfake "k8s.io/client-go/dynamic/fake"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"castellan.dev/api/policy"
	"castellan.dev/internal/kube"
)

// What is read once is what the server makes of the same objects.
func TestReadInventory(t *testing.T) {
	s := newScene(t,
		meshPod("shop", "orders-1", "orders", "10.0.0.1"), meshPod("shop", "legacy-1", "legacy", "10.0.0.2", outside), meshPod("blog", "web-1", "web", "10.0.0.3"),
		svc("shop", "orders", "orders"), svc("blog", "web", "web"),
		sliceOf("shop", "orders", nil, endpoint{"10.0.0.1", "uid-orders-1"}), sliceOf("blog", "web", nil, endpoint{"10.0.0.3", "uid-web-1"}),
	)
	client := kube.Wrap(s.client, dynamicfake.NewSimpleDynamicClient(runtime.NewScheme()), namespace)
	all, err := client.ReadInventory(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want := describe(s.inv.Current())
	if got := describe(all); !slices.Equal(got, want) || len(got) != 5 {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if all.Resolved != s.inv.Current().Resolved {
		t.Errorf("resolved: %v", all.Resolved)
	}
	one, err := client.ReadInventory(t.Context(), "shop")
	if err != nil {
		t.Fatal(err)
	}
	want = slices.DeleteFunc(want, func(line string) bool { return strings.Contains(line, "blog/") })
	if got := describe(one); !slices.Equal(got, want) || len(got) != 3 {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	nobody, err := client.ReadInventory(t.Context(), "empty")
	if err != nil || nobody == nil || len(nobody.Workloads)+len(nobody.Services) != 0 {
		t.Errorf("%v %v", nobody, err)
	}
	s.client.PrependReactor("list", "services", func(clienttesting.Action) (bool, runtime.Object, error) {
		return true, nil, apierrors.NewForbidden(schema.GroupResource{Resource: "services"}, "", errors.New("no"))
	})
	if _, err := client.ReadInventory(t.Context(), "shop"); !apierrors.IsForbidden(err) {
		t.Errorf("got %v", err)
	}
}

func TestReadPolicies(t *testing.T) {
	typed := fake.NewClientset()
	typed.Resources = resources("v1beta1")
	elsewhere := authorization("two")
	elsewhere.SetNamespace("blog")
	old := schema.GroupVersionResource{Group: policy.Group, Version: "v1beta1", Resource: "authorizationpolicies"}
	dyn := dynamicfake.NewSimpleDynamicClientWithCustomListKinds(runtime.NewScheme(), listKinds())
	for ns, o := range map[string]runtime.Object{"shop": authorization("one"), "blog": elsewhere} {
		if err := dyn.Tracker().Create(old, o, ns); err != nil {
			t.Fatal(err)
		}
	}
	client := kube.Wrap(typed, dyn, namespace)
	for _, c := range []struct {
		namespaces []string
		want       string
	}{
		{nil, "blog/two shop/one"}, {[]string{"shop"}, "shop/one"}, {[]string{"shop", "blog"}, "blog/two shop/one"}, {[]string{"empty"}, ""},
	} {
		got, err := client.ReadPolicies(t.Context(), c.namespaces...)
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, o := range got {
			names = append(names, o.Namespace+"/"+o.Name)
			if o.Kind != "AuthorizationPolicy" || o.Generation != 3 || strings.Contains(string(o.JSON), "managedFields") {
				t.Errorf("%+v: %s", o, o.JSON)
			}
		}
		if strings.Join(names, " ") != c.want {
			t.Errorf("%q: got %q, want %q", c.namespaces, names, c.want)
		}
	}
	typed.Resources = nil
	if got, err := client.ReadPolicies(t.Context()); err != nil || len(got) != 0 || got == nil {
		t.Errorf("no such kinds: %v %v", got, err)
	}
	typed.Resources = resources("v1")
	dyn.PrependReactor("list", "*", func(clienttesting.Action) (bool, runtime.Object, error) {
		return true, nil, apierrors.NewForbidden(schema.GroupResource{Resource: "authorizationpolicies"}, "", errors.New("no"))
	})
	if _, err := client.ReadPolicies(t.Context()); !apierrors.IsForbidden(err) {
		t.Errorf("got %v", err)
	}
}
