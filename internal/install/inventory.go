package install

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"
)

// inventoryName is the ConfigMap that says what was installed.
const inventoryName = "castellan-install"

// maxInventory bounds what is read of it: it is an object that others can write.
const maxInventory = 1000

// Inventory is what an installation put into the cluster: what a later one that no
// longer has it removes, and an uninstallation.
type Inventory struct {
	Version    string
	AppVersion string
	// Values are those that were asked for.
	Values  map[string]any
	Objects []ref
}

func inventoryRef(namespace string) ref {
	return ref{Kind: "ConfigMap", Namespace: namespace, Name: inventoryName}
}

// readInventory returns nil where nothing was installed.
func (in *Installer) readInventory(ctx context.Context) (*Inventory, error) {
	o, err := in.get(ctx, inventoryRef(in.cfg.Namespace))
	if o == nil || err != nil {
		return nil, err
	}
	data, _, err := unstructured.NestedStringMap(o.Object, "data")
	if err != nil {
		return nil, fmt.Errorf("%s: %w", inventoryRef(in.cfg.Namespace), err)
	}
	inv := &Inventory{Version: data["version"], AppVersion: data["appVersion"]}
	if err := json.Unmarshal([]byte(data["objects"]), &inv.Objects); err != nil {
		return nil, fmt.Errorf("%s: objects: %w", inventoryRef(in.cfg.Namespace), err)
	}
	if len(inv.Objects) > maxInventory {
		return nil, fmt.Errorf("%s: %d objects, at most %d are believed", inventoryRef(in.cfg.Namespace), len(inv.Objects), maxInventory)
	}
	if err := yaml.Unmarshal([]byte(data["values"]), &inv.Values); err != nil {
		return nil, fmt.Errorf("%s: values: %w", inventoryRef(in.cfg.Namespace), err)
	}
	return inv, nil
}

func (in *Installer) writeInventory(ctx context.Context, inv Inventory) error {
	objects, err := json.Marshal(inv.Objects)
	if err != nil {
		return err
	}
	values, err := yaml.Marshal(inv.Values)
	if err != nil {
		return err
	}
	o := &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "v1", "kind": "ConfigMap",
		"metadata": map[string]any{"name": inventoryName, "namespace": in.cfg.Namespace},
		"data": map[string]any{
			"version": inv.Version, "appVersion": inv.AppVersion, "objects": string(objects), "values": string(values),
		},
	}}
	setLabel(o, labelManagedBy, manager)
	setLabel(o, labelName, release)
	return in.apply(ctx, o)
}

// prune removes what an earlier installation had and this one has not, and returns
// what is left of the earlier one's list.
func (in *Installer) prune(ctx context.Context, old, now []ref) error {
	for _, r := range old {
		if slices.Contains(now, r) {
			continue
		}
		o, err := in.get(ctx, r)
		if err != nil {
			return err
		}
		if o == nil || kept(o) || o.GetLabels()[labelManagedBy] != manager {
			continue
		}
		in.progress("removing %s, which this version does not have", r)
		if err := in.remove(ctx, r); err != nil {
			return err
		}
	}
	return nil
}

// kept: what holds state outlives the release that made it, by Helm's own word for it.
func kept(o *unstructured.Unstructured) bool {
	return o.GetAnnotations()["helm.sh/resource-policy"] == "keep"
}

// get returns nil for an object that is not there.
func (in *Installer) get(ctx context.Context, r ref) (*unstructured.Unstructured, error) {
	client, err := r.in(in.cfg.Dynamic)
	if err != nil {
		return nil, err
	}
	o, err := client.Get(ctx, r.Name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", r, err)
	}
	return o, nil
}

// remove deletes an object; one that is not there is no error.
func (in *Installer) remove(ctx context.Context, r ref) error {
	client, err := r.in(in.cfg.Dynamic)
	if err != nil {
		return err
	}
	background := metav1.DeletePropagationBackground
	if err := client.Delete(ctx, r.Name, metav1.DeleteOptions{PropagationPolicy: &background}); err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("remove %s: %w", r, err)
	}
	return nil
}
