package webhook

import (
	"cmp"
	"strings"

	corev1 "k8s.io/api/core/v1"
)

const (
	tlsModeIstio = "istio"

	labelCanonicalName     = "service.istio.io/canonical-name"
	labelCanonicalRevision = "service.istio.io/canonical-revision"
	labelEnforce           = "pod-security.kubernetes.io/enforce"

	maxLabelValue = 63
)

// addMetadata sets the labels others know an injected pod by. What the pod says of
// itself stays.
func addMetadata(p *corev1.Pod, o *options) {
	setString(&p.Labels, labelTLSMode, tlsModeIstio)
	l := p.Labels
	name := cmp.Or(l[labelCanonicalName], l["app.kubernetes.io/name"], l["app"], workloadName(p))
	if name = labelValue(name); name != "" {
		l[labelCanonicalName] = name
	}
	revision := cmp.Or(l[labelCanonicalRevision], l["app.kubernetes.io/version"], l["version"], "latest")
	l[labelCanonicalRevision] = cmp.Or(labelValue(revision), "latest")
	// With the proxy among the containers, kubectl would not know which is meant.
	if _, ok := p.Annotations[annotationMain]; !ok && len(p.Spec.Containers) > 0 && !o.native {
		setString(&p.Annotations, annotationMain, p.Spec.Containers[0].Name)
	}
}

// workloadName is what made the pod: its Deployment's name where that can be told.
func workloadName(p *corev1.Pod) string {
	for _, ref := range p.OwnerReferences {
		if ref.Controller == nil || !*ref.Controller {
			continue
		}
		if hash := p.Labels["pod-template-hash"]; ref.Kind == "ReplicaSet" && hash != "" {
			return strings.TrimSuffix(ref.Name, "-"+hash)
		}
		return ref.Name
	}
	return cmp.Or(p.Name, strings.TrimSuffix(p.GenerateName, "-"))
}

// labelValue makes a name fit for a label.
func labelValue(s string) string {
	s = s[:min(len(s), maxLabelValue)]
	return strings.TrimFunc(s, func(r rune) bool { return r > 0x7f || !alphanumeric(byte(r)) })
}

// warnOfNamespace tells beforehand what Pod Security would refuse afterwards.
func warnOfNamespace(ns Namespace, o *options) {
	if level := ns.Labels[labelEnforce]; level == "baseline" || level == "restricted" {
		o.warnf("the namespace enforces Pod Security %q, which forbids NET_ADMIN of %s", level, containerInit)
	}
}
