package install

import (
	"context"
	"reflect"
	"slices"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

func isRole(o *unstructured.Unstructured) bool {
	return o.GetKind() == "ClusterRole" || o.GetKind() == "Role"
}

// widened returns a role that permits, besides what it is to permit, what it does
// now: the server that runs needs that until the next one has taken its place.
func (in *Installer) widened(ctx context.Context, role *unstructured.Unstructured) (*unstructured.Unstructured, error) {
	live, err := in.get(ctx, refOf(role))
	if err != nil || live == nil {
		return role, err
	}
	rules, _, err := unstructured.NestedSlice(role.Object, "rules")
	if err != nil {
		return nil, err
	}
	now, _, err := unstructured.NestedSlice(live.Object, "rules")
	if err != nil {
		return nil, err
	}
	for _, rule := range now {
		if !slices.ContainsFunc(rules, func(have any) bool { return reflect.DeepEqual(have, rule) }) {
			rules = append(rules, rule)
		}
	}
	role = role.DeepCopy()
	return role, unstructured.SetNestedSlice(role.Object, rules, "rules")
}

// narrow leaves each role with what it is to permit, and no more.
func (in *Installer) narrow(ctx context.Context, objects []*unstructured.Unstructured) error {
	for _, o := range objects {
		if !isRole(o) {
			continue
		}
		if err := in.apply(ctx, o); err != nil {
			return err
		}
	}
	return nil
}
