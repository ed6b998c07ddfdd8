package install

import (
	"context"
	"fmt"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

// ConflictError is an object that somebody else manages.
type ConflictError struct{ Object, Manager string }

func (e *ConflictError) Error() string {
	return fmt.Sprintf("%s is managed by %s; upgrade it with that, or remove it first", e.Object, e.Manager)
}

// apply makes an object be as it is written, and touches no field that is not:
// what the server writes (a Secret's data, a webhook's caBundle) stays.
func (in *Installer) apply(ctx context.Context, o *unstructured.Unstructured) error {
	r := refOf(o)
	client, err := r.in(in.cfg.Dynamic)
	if err != nil {
		return err
	}
	live, err := in.get(ctx, r)
	if err != nil {
		return err
	}
	if live != nil {
		// What a former installation left behind is taken over, whoever that was by.
		if by := live.GetLabels()[labelManagedBy]; by != "" && by != manager && !kept(live) {
			return &ConflictError{Object: r.String(), Manager: by}
		}
		if o, err = keepLive(o, live); err != nil {
			return fmt.Errorf("%s: %w", r, err)
		}
	}
	// Force: only fields that stand in o are fought over, and those are ours.
	_, err = client.Apply(ctx, r.Name, o, metav1.ApplyOptions{FieldManager: manager, Force: true})
	switch {
	case apierrors.IsForbidden(err):
		return fmt.Errorf("apply %s: %w; installing needs the rights of a cluster administrator", r, err)
	case err != nil:
		return fmt.Errorf("apply %s: %w", r, err)
	}
	return nil
}

// keepLive returns the object with what the server is free to change as it is
// now: the validator's failurePolicy, which begins as Ignore.
func keepLive(o, live *unstructured.Unstructured) (*unstructured.Unstructured, error) {
	if o.GetKind() != "ValidatingWebhookConfiguration" {
		return o, nil
	}
	now := map[string]any{}
	liveHooks, _, err := unstructured.NestedSlice(live.Object, "webhooks")
	if err != nil {
		return nil, err
	}
	for _, h := range liveHooks {
		if hook, ok := h.(map[string]any); ok {
			if name, ok := hook["name"].(string); ok {
				now[name] = hook["failurePolicy"]
			}
		}
	}
	o = o.DeepCopy()
	hooks, _, err := unstructured.NestedSlice(o.Object, "webhooks")
	if err != nil {
		return nil, err
	}
	for _, h := range hooks {
		hook, ok := h.(map[string]any)
		if !ok {
			continue
		}
		if name, ok := hook["name"].(string); ok && now[name] != nil {
			hook["failurePolicy"] = now[name]
		}
	}
	return o, unstructured.SetNestedSlice(o.Object, hooks, "webhooks")
}

// applyCRD leaves alone what somebody else installed: they may hold more than ours.
func (in *Installer) applyCRD(ctx context.Context, crd *unstructured.Unstructured) error {
	live, err := in.get(ctx, refOf(crd))
	if err != nil {
		return err
	}
	if live != nil && live.GetLabels()[labelManagedBy] != manager {
		in.progress("using the %s that is installed already", crd.GetName())
		return nil
	}
	return in.apply(ctx, crd)
}

const (
	labelEnforce = "pod-security.kubernetes.io/enforce"
	// privileged is the level that the agents' pods need: they run as root and use
	// the node's own directories.
	privileged = "privileged"

	labelInjection = "istio-injection"
)

// applyNamespace makes the namespace, or adds to one that is there what it lacks.
func (in *Installer) applyNamespace(ctx context.Context) error {
	name := in.cfg.Namespace
	live, err := in.get(ctx, ref{Kind: "Namespace", Name: name})
	if err != nil {
		return err
	}
	o := namespaceObject(name)
	if live != nil {
		labels := live.GetLabels()
		if has := labels[labelEnforce]; has != "" && has != privileged {
			return fmt.Errorf("namespace %s: its label %s=%s keeps the agents' pods out; set it to %s, or choose another namespace", name, labelEnforce, has, privileged)
		}
		// A namespace that was there is not ours to remove, nor to label otherwise.
		own := o.GetLabels()
		if labels[labelName] != release {
			delete(own, labelName)
		}
		if has, ok := labels[labelInjection]; ok {
			own[labelInjection] = has
		}
		o.SetLabels(own)
	}
	client, err := refOf(o).in(in.cfg.Dynamic)
	if err != nil {
		return err
	}
	if _, err := client.Apply(ctx, name, o, metav1.ApplyOptions{FieldManager: manager, Force: true}); err != nil {
		return fmt.Errorf("apply namespace %s: %w", name, err)
	}
	return nil
}

func namespaceObject(name string) *unstructured.Unstructured {
	o := &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "v1", "kind": "Namespace", "metadata": map[string]any{"name": name},
	}}
	setLabel(o, labelEnforce, privileged)
	// Whoever selects namespaces by this label leaves ours alone.
	setLabel(o, labelInjection, "disabled")
	setLabel(o, labelName, release)
	return o
}
