package cli

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"castellan.dev/internal/kube"
)

// podRef names a pod as kubectl does: by itself, or by a deployment of which any
// will do.
type podRef struct{ kind, name string }

func (r podRef) String() string { return r.kind + "/" + r.name }

// parsePodRef reads "pod/NAME" and "deploy/NAME", with kubectl's other spellings.
func parsePodRef(s string) (podRef, bool) {
	kind, name, ok := strings.Cut(s, "/")
	if !ok || name == "" || strings.Contains(name, "/") {
		return podRef{}, false
	}
	switch kind {
	case "pod", "pods", "po":
		return podRef{"pod", name}, true
	case "deployment", "deployments", "deploy":
		return podRef{"deployment", name}, true
	}
	return podRef{}, false
}

func parsePodArg(s string) (podRef, error) {
	if ref, ok := parsePodRef(s); ok {
		return ref, nil
	}
	if s == "" || strings.Contains(s, "/") {
		return podRef{}, invalidf("%q names no pod; want NAME, pod/NAME or deploy/NAME, and the namespace by -n", s)
	}
	return podRef{"pod", s}, nil
}

// find returns the pod; of a deployment's the first that is ready, or that there is.
func (r podRef) find(ctx context.Context, client *kube.Client, namespace string) (*corev1.Pod, error) {
	api := client.Kubernetes()
	if r.kind == "pod" {
		pod, err := api.CoreV1().Pods(namespace).Get(ctx, r.name, metav1.GetOptions{})
		return pod, apiError(err, "get", "pods", namespace)
	}
	d, err := api.AppsV1().Deployments(namespace).Get(ctx, r.name, metav1.GetOptions{})
	if err != nil {
		return nil, apiError(err, "get", "deployments", namespace)
	}
	selector, err := metav1.LabelSelectorAsSelector(d.Spec.Selector)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", r, err)
	}
	list, err := api.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: selector.String()})
	if err != nil {
		return nil, apiError(err, "list", "pods", namespace)
	}
	if len(list.Items) == 0 {
		return nil, invalidf("%s in namespace %s has no pods", r, namespace)
	}
	slices.SortFunc(list.Items, func(a, b corev1.Pod) int {
		return cmp.Or(cmp.Compare(rank(&a), rank(&b)), cmp.Compare(a.Name, b.Name))
	})
	return &list.Items[0], nil
}

// rank orders pods by how well they serve for an example.
func rank(p *corev1.Pod) int {
	switch {
	case p.DeletionTimestamp != nil:
		return 2
	case slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool {
		return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
	}):
		return 0
	}
	return 1
}

// apiError adds to the API server's words what to do about them; nil stays nil.
func apiError(err error, verb, resource, namespace string) error {
	where := "in namespace " + namespace
	if namespace == "" {
		where = "in all namespaces"
	}
	switch {
	case err == nil:
		return nil
	case apierrors.IsForbidden(err):
		return fmt.Errorf("%w; this needs the verb %s on %s %s", err, verb, resource, where)
	case apierrors.IsNotFound(err):
		return invalidf("%w %s", err, where)
	}
	return fmt.Errorf("the API server: %w", err)
}
