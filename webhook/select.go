package webhook

import (
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"castellan.dev/internal/config"
)

// Labels and annotations that choose, and what a chosen pod is known by.
const (
	labelInjection = "istio-injection"           // of a namespace
	labelRevision  = "istio.io/rev"              // of a namespace or a pod
	labelInject    = "sidecar.istio.io/inject"   // of a pod; an annotation of the name counts less
	labelTLSMode   = "security.istio.io/tlsMode" // what makes others speak mTLS to a pod

	injectionEnabled = "enabled"
	revisionDefault  = "default"
)

// systemNamespaces get no sidecar, as with Istio: what brings pods up must not
// wait for what makes them join.
func systemNamespaces() []string {
	return []string{"kube-system", "kube-public", "kube-node-lease", "local-path-storage"}
}

// Namespace is what is known of the namespace a pod is made in.
type Namespace struct {
	Name string
	// Labels, where known.
	Labels map[string]string
	// Selected says that the API server's selectors chose the pod already. Then
	// labels of the namespace and of the pod's revision are not asked again: our view
	// of them may lag behind, and to skip a pod by an old view would be to let it
	// run without a sidecar.
	Selected bool
}

// wanted decides whether a pod gets a sidecar, by Istio's conventions, or why not.
// A switch that cannot be read is refused: it may have been meant either way.
func (in *Injector) wanted(pod *corev1.Pod, ns Namespace) (wanted bool, why string, err error) {
	switch {
	case slices.Contains(in.excluded, ns.Name):
		return false, "its namespace is never injected", nil
	case pod.Spec.HostNetwork:
		return false, "it uses the node's network, where nothing can be captured for it alone", nil
	case onWindows(pod):
		return false, "it is for Windows", nil
	case isMirror(pod):
		return false, "it mirrors a pod that the kubelet runs from a file", nil
	}
	if off, err := switchedOff(pod); off || err != nil {
		return false, labelInject + " says no", err
	}
	if ns.Selected {
		return true, "", nil
	}
	wanted, why = in.selected(pod.Labels, ns.Labels)
	return wanted, why, nil
}

// selected is what the selectors of the webhook configurations say.
func (in *Injector) selected(pod, namespace map[string]string) (bool, string) {
	injection, labelled := namespace[labelInjection]
	revision, pinned := namespace[labelRevision]
	switch {
	case labelled && injection == injectionEnabled:
		return in.defaultRevision(), "its namespace asks for the default injector, which is another one"
	case labelled:
		return false, "its namespace is labelled " + labelInjection + "=" + shorten(injection)
	case pinned:
		return in.ours(revision), "its namespace asks for another revision"
	}
	if revision, ok := pod[labelRevision]; ok {
		return in.ours(revision), "it asks for another revision"
	}
	if pod[labelInject] == "true" {
		return in.defaultRevision(), "it asks for the default injector, which is another one"
	}
	return false, "neither it nor its namespace is labelled for injection"
}

func (in *Injector) defaultRevision() bool { return config.On(in.cfg.DefaultRevision, true) }

func (in *Injector) ours(revision string) bool {
	return revision == in.cfg.Revision || revision == revisionDefault && in.defaultRevision()
}

// switchedOff reads the pod's own word; the label beats the annotation.
func switchedOff(pod *corev1.Pod) (bool, error) {
	kind := "label"
	value, given := pod.Labels[labelInject]
	if !given {
		kind, value = "annotation", pod.Annotations[labelInject]
	}
	// The words of YAML, which Istio takes as well.
	switch strings.ToLower(value) {
	case "", "y", "yes", "true", "on":
		return false, nil
	case "n", "no", "false", "off":
		return true, nil
	default:
		return false, refusef(kind+" "+labelInject, value, `want "true" or "false"`)
	}
}

func onWindows(pod *corev1.Pod) bool {
	return pod.Spec.OS != nil && pod.Spec.OS.Name == corev1.Windows || pod.Spec.NodeSelector[corev1.LabelOSStable] == string(corev1.Windows)
}

func isMirror(pod *corev1.Pod) bool {
	_, ok := pod.Annotations[annotationMirror]
	return ok
}
