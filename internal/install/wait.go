package install

import (
	"context"
	"errors"
	"fmt"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
)

// until asks again and again until done says so, telling of each new state. It
// ends with the last state when ctx does.
func (in *Installer) until(ctx context.Context, what string, ask func(context.Context) (done bool, state string, err error)) error {
	tick := time.NewTicker(in.cfg.Poll)
	defer tick.Stop()
	said := ""
	for {
		done, state, err := ask(ctx)
		switch {
		case err == nil && done:
			return nil
		case err != nil && ctx.Err() == nil && !passing(err):
			return err
		case err != nil && ctx.Err() == nil:
			state = err.Error()
		}
		if state != "" && state != said && ctx.Err() == nil {
			in.progress("waiting for %s: %s", what, state)
			said = state
		}
		select {
		case <-ctx.Done():
			return &waitError{what: what, state: said, cause: context.Cause(ctx)}
		case <-tick.C:
		}
	}
}

// waitError is a wait that ended before what was waited for.
type waitError struct {
	what, state string
	cause       error
}

func (e *waitError) Error() string {
	reason := "gave up waiting for"
	if errors.Is(e.cause, context.Canceled) {
		reason = "interrupted while waiting for"
	}
	if e.state == "" {
		return reason + " " + e.what
	}
	return fmt.Sprintf("%s %s: %s", reason, e.what, e.state)
}

func (e *waitError) Unwrap() error { return e.cause }

// passing errors are worth another try.
func passing(err error) bool {
	return apierrors.IsServerTimeout(err) || apierrors.IsTimeout(err) || apierrors.IsTooManyRequests(err) ||
		apierrors.IsServiceUnavailable(err) || apierrors.IsInternalError(err) || apierrors.ReasonForError(err) == "" // no answer at all
}

// established: the API server serves the kind.
func (in *Installer) established(ctx context.Context, crd *unstructured.Unstructured) error {
	return in.until(ctx, crd.GetName(), func(ctx context.Context) (bool, string, error) {
		live, err := in.get(ctx, refOf(crd))
		if err != nil || live == nil {
			return false, "not there yet", err
		}
		status, message := condition(live, "Established")
		return status == "True", message, nil
	})
}

func condition(o *unstructured.Unstructured, kind string) (status, message string) {
	list, _, _ := unstructured.NestedSlice(o.Object, "status", "conditions")
	for _, c := range list {
		if m, ok := c.(map[string]any); ok && m["type"] == kind {
			status, _ = m["status"].(string)
			message, _ = m["message"].(string)
		}
	}
	return status, message
}

// ready waits until the pods of a Deployment or DaemonSet are of its latest
// version, and ready.
func (in *Installer) ready(ctx context.Context, r ref) error {
	return in.until(ctx, r.Name, func(ctx context.Context) (bool, string, error) {
		live, err := in.get(ctx, r)
		if err != nil || live == nil {
			return false, "not there yet", err
		}
		done, state, err := rolledOut(live)
		if err != nil || done {
			return done, state, err
		}
		if state == unseen {
			return false, "", nil // the pods that there are, are those of before
		}
		if why := in.whyNot(ctx, r); why != "" {
			state += " (" + why + ")"
		}
		return false, state, nil
	})
}

// unseen is the state of what its controller has not looked at yet.
const unseen = "its controller has not looked yet"

// rolledOut says how far a Deployment or DaemonSet is.
func rolledOut(o *unstructured.Unstructured) (bool, string, error) {
	var want, updated, ready int32
	var observed, generation int64
	switch o.GetKind() {
	case "Deployment":
		var d appsv1.Deployment
		if err := runtime.DefaultUnstructuredConverter.FromUnstructured(o.Object, &d); err != nil {
			return false, "", err
		}
		want = 1
		if d.Spec.Replicas != nil {
			// One that was scaled to none has nobody left to be ready.
			want = max(*d.Spec.Replicas, 1)
		}
		updated, ready = d.Status.UpdatedReplicas, d.Status.AvailableReplicas
		observed, generation = d.Status.ObservedGeneration, d.Generation
		if d.Status.Replicas > updated {
			return false, "the pods of before are ending", nil
		}
	case "DaemonSet":
		var d appsv1.DaemonSet
		if err := runtime.DefaultUnstructuredConverter.FromUnstructured(o.Object, &d); err != nil {
			return false, "", err
		}
		want, updated, ready = d.Status.DesiredNumberScheduled, d.Status.UpdatedNumberScheduled, d.Status.NumberAvailable
		observed, generation = d.Status.ObservedGeneration, d.Generation
	}
	if observed < generation {
		return false, unseen, nil
	}
	ready = min(ready, updated)
	return ready >= want, fmt.Sprintf("%d of %d ready", ready, want), nil
}

// trusted waits until the server has put its roots into every webhook.
func (in *Installer) trusted(ctx context.Context, r ref) error {
	return in.until(ctx, r.Name, func(ctx context.Context) (bool, string, error) {
		live, err := in.get(ctx, r)
		if err != nil || live == nil {
			return false, "not there yet", err
		}
		hooks, _, err := unstructured.NestedSlice(live.Object, "webhooks")
		if err != nil {
			return false, "", err
		}
		for _, h := range hooks {
			if hook, ok := h.(map[string]any); ok {
				if bundle, _, _ := unstructured.NestedString(hook, "clientConfig", "caBundle"); bundle == "" {
					return false, "the server has not put its roots into it yet", nil
				}
			}
		}
		return true, "", nil
	})
}
