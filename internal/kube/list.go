package kube

import (
	"cmp"
	"context"
	"fmt"
	"slices"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/tools/pager"

	"castellan.dev/api/policy"
	"castellan.dev/internal/workloads"
)

// ReadInventory reads the pods and services of the namespaces, or of all where none
// is given, once, and makes of them what the server makes of them.
//
// RBAC: list of pods, services and endpointslices (discovery.k8s.io) in the namespaces.
func (c *Client) ReadInventory(ctx context.Context, namespaces ...string) (*workloads.File, error) {
	i, err := NewInformers(InformersConfig{Kubernetes: c.kubernetes, Dynamic: c.dynamic})
	if err != nil {
		return nil, err
	}
	inv := NewInventory(InventoryConfig{Informers: i})
	core, disc := c.kubernetes.CoreV1(), c.kubernetes.DiscoveryV1()
	for _, ns := range orAll(namespaces) {
		for _, l := range []struct {
			to   *mirror
			list func(context.Context, metav1.ListOptions) (runtime.Object, error)
		}{
			{i.pods, listing(core.Pods(ns).List)},
			{i.services, listing(core.Services(ns).List)},
			{i.endpoints, listing(disc.EndpointSlices(ns).List)},
		} {
			if err := eachOf(ctx, l.list, func(o runtime.Object) error { return l.to.Add(l.to.reduce(o)) }); err != nil {
				return nil, fmt.Errorf("kube: %s: %w", l.to.name, err)
			}
		}
	}
	inv.update()
	return inv.Current(), nil
}

// ReadPolicies reads the policies of the namespaces, or of all where none is given,
// once, as Policies gives them. A kind that the API server does not serve has none.
//
// RBAC: list of the three kinds of security.istio.io in the namespaces.
func (c *Client) ReadPolicies(ctx context.Context, namespaces ...string) ([]policy.Object, error) {
	p := newPolicies(InformersConfig{Kubernetes: c.kubernetes, Dynamic: c.dynamic})
	out := []policy.Object{}
	for _, k := range p.kinds {
		version, err := p.served(ctx, k)
		if err != nil {
			return nil, fmt.Errorf("kube: %s: %w", k.resource, err)
		}
		if version == "" {
			continue
		}
		at := c.dynamic.Resource(schema.GroupVersionResource{Group: policy.Group, Version: version, Resource: k.resource})
		for _, ns := range orAll(namespaces) {
			if err := eachOf(ctx, listing(at.Namespace(ns).List), func(o runtime.Object) error {
				if po, ok := reducePolicy(o).(*policyObject); ok {
					out = append(out, policy.Object{Kind: k.kind, Namespace: po.Namespace, Name: po.Name, UID: string(po.UID), Generation: po.Generation, JSON: po.json})
				}
				return nil
			}); err != nil {
				return nil, fmt.Errorf("kube: %s: %w", k.resource, err)
			}
		}
	}
	slices.SortFunc(out, func(a, b policy.Object) int {
		return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
	return out, nil
}

func orAll(namespaces []string) []string {
	if len(namespaces) == 0 {
		return []string{metav1.NamespaceAll}
	}
	return namespaces
}

// eachOf lists in pages.
func eachOf(ctx context.Context, list func(context.Context, metav1.ListOptions) (runtime.Object, error), do func(runtime.Object) error) error {
	return pager.New(list).EachListItemWithAlloc(ctx, metav1.ListOptions{}, do)
}
