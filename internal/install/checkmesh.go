package install

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// checkInjection: what runs in namespaces labelled for injection has a sidecar, and
// the sidecars are ready.
func (in *Installer) checkInjection(_ context.Context, v *cluster, out *results) {
	const check = "sidecars"
	if v.noPods != nil {
		out.unknown(check, v.noPods)
		return
	}
	var without, unready []string
	var logs string // of the first that is not ready
	with, bad := 0, false
	for i := range v.pods {
		pod := &v.pods[i]
		name := pod.Namespace + "/" + pod.Name
		switch {
		case pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed || pod.DeletionTimestamp != nil:
		case proxyTag(pod) != "":
			with++
			if container, why := sidecarTrouble(pod); why != "" {
				unready = append(unready, name+" ("+why+")")
				logs = cmp.Or(logs, fmt.Sprintf("kubectl logs -n %s %s -c %s", pod.Namespace, pod.Name, container))
			}
		case v.namespaces[pod.Namespace][labelInjection] == "enabled" && !pod.Spec.HostNetwork && pod.Labels["sidecar.istio.io/inject"] != "false" && pod.Annotations["sidecar.istio.io/inject"] != "false":
			without = append(without, name)
		}
	}
	if len(without) > 0 {
		bad = true
		out.warn(check, "they are older than the label, or than Castellan: kubectl rollout restart", "%s without one in namespaces labelled for injection: %s", count(len(without), "pod"), some(without))
	}
	if len(unready) > 0 {
		bad = true
		out.fail(check, logs+"; the agent's and the server's log say why an identity is refused", "not ready: %s", some(unready))
	}
	if !bad {
		out.ok(check, "%s, all ready", count(with, "pod"))
	}
}

// sidecarTrouble is which container of ours is not ready and why, empty when all are.
func sidecarTrouble(pod *corev1.Pod) (container, why string) {
	for _, c := range slices.Concat(pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses) {
		if !strings.Contains(c.Image, "castellan-proxy") || c.Ready || c.State.Terminated != nil {
			continue
		}
		switch {
		case c.State.Waiting != nil:
			return c.Name, shorten(c.State.Waiting.Reason)
		case c.LastTerminationState.Terminated != nil:
			return c.Name, fmt.Sprintf("ended with code %d", c.LastTerminationState.Terminated.ExitCode)
		default:
			return c.Name, "no identity or no policy yet"
		}
	}
	return "", ""
}

// policyKinds are the three kinds of policy.
var policyKinds = []schema.GroupVersionResource{
	{Group: "security.istio.io", Version: "v1", Resource: "authorizationpolicies"},
	{Group: "security.istio.io", Version: "v1", Resource: "requestauthentications"},
	{Group: "security.istio.io", Version: "v1", Resource: "peerauthentications"},
}

// checkPolicies: the server took every policy, and every proxy acknowledged it.
func (in *Installer) checkPolicies(ctx context.Context, _ *cluster, out *results) {
	const check = "policies"
	total, bad := 0, 0
	for _, kind := range policyKinds {
		opts := metav1.ListOptions{Limit: pageSize}
		for {
			list, err := in.cfg.Dynamic.Resource(kind).List(ctx, opts)
			if apierrors.IsNotFound(err) {
				out.fail(check, "castellan install", "the API server does not know %s", kind.Resource)
				return
			}
			if err != nil {
				out.unknown(check, err)
				return
			}
			for i := range list.Items {
				total++
				if !policyWell(&list.Items[i], out) {
					bad++
				}
			}
			if opts.Continue = list.GetContinue(); opts.Continue == "" {
				break
			}
		}
	}
	if bad == 0 {
		out.ok(check, "%d, all in force", total)
	}
}

// policyWell reads the conditions that the server writes.
func policyWell(o *unstructured.Unstructured, out *results) bool {
	name := fmt.Sprintf("%s %s/%s", o.GetKind(), o.GetNamespace(), o.GetName())
	accepted, why := condition(o, "Accepted")
	switch accepted {
	case "":
		out.warn(name, "the server writes its status within a second; is it up?", "the server has not looked at it")
		return false
	case "False":
		out.fail(name, "mend it: a workload that it could select denies everything, or keeps its last good version", "refused: %s", shorten(why))
		return false
	}
	if programmed, why := condition(o, "Programmed"); programmed == "False" {
		out.warn(name, "the proxies that have not acknowledged it enforce the version of before", "%s", shorten(why))
		return false
	}
	return true
}
