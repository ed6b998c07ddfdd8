package webhook

import (
	"fmt"
	"slices"
	"strings"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
)

// Conflict is another injector that the API server asks about a pod that it asks
// us about: such a pod would be refused, or get two sidecars.
type Conflict struct {
	// Configuration and Webhook name the other injector.
	Configuration, Webhook string
	// Namespace is one that there is; empty where any that is labelled so is meant.
	Namespace string
	// NamespaceLabels and PodLabels are of a pod that both select.
	NamespaceLabels, PodLabels map[string]string
}

// String says what is so, in one line.
func (c Conflict) String() string {
	where := "a namespace labelled " + describe(c.NamespaceLabels)
	if c.Namespace != "" {
		where = "namespace " + c.Namespace
	}
	pod := "pods"
	if len(c.PodLabels) > 0 {
		pod = "pods labelled " + describe(c.PodLabels)
	}
	return fmt.Sprintf("webhook %s of %s selects the same %s in %s", c.Webhook, c.Configuration, pod, where)
}

// Hint says what to do.
func (c Conflict) Hint() string {
	return fmt.Sprintf("let one injector have the default labels: install Castellan with webhook.inject.defaultRevision=false and label namespaces istio.io/rev=castellan, or remove the other (kubectl delete mutatingwebhookconfiguration %s)", c.Configuration)
}

func describe(set map[string]string) string {
	if len(set) == 0 {
		return "not at all"
	}
	return labels.Set(set).String()
}

// Conflicts finds the injectors of others, Istio's above all, that would be asked
// about the same pods as this one: in the given namespaces, and in any that may
// yet be labelled. Configurations named ours are passed over.
func (in *Injector) Conflicts(list []admissionregistrationv1.MutatingWebhookConfiguration, ours string, namespaces []Namespace) []Conflict {
	var out []Conflict
	for i := range list {
		if list[i].Name == ours {
			continue
		}
		for j := range list[i].Webhooks {
			w := &list[i].Webhooks[j]
			if !injectsSidecars(w) {
				continue
			}
			if c, found := in.conflict(w, namespaces); found {
				c.Configuration, c.Webhook = list[i].Name, w.Name
				out = append(out, c)
			}
		}
	}
	return out
}

// injectsSidecars knows an injector by the path and name that Istio's has, whoever
// installed it.
func injectsSidecars(w *admissionregistrationv1.MutatingWebhook) bool {
	path := ""
	switch {
	case w.ClientConfig.Service != nil && w.ClientConfig.Service.Path != nil:
		path = *w.ClientConfig.Service.Path
	case w.ClientConfig.URL != nil:
		path = *w.ClientConfig.URL
	}
	named := strings.HasSuffix(w.Name, "sidecar-injector.istio.io") || strings.HasSuffix(w.Name, "sidecar-injector.castellan.dev")
	return (named || strings.Contains(path, InjectPath)) && slices.ContainsFunc(w.Rules, createsPods)
}

func createsPods(r admissionregistrationv1.RuleWithOperations) bool {
	has := func(list []string, value string) bool {
		return slices.Contains(list, value) || slices.Contains(list, "*")
	}
	op := slices.Contains(r.Operations, admissionregistrationv1.Create) || slices.Contains(r.Operations, admissionregistrationv1.OperationAll)
	return op && has(r.APIGroups, "") && (has(r.Resources, "pods") || has(r.Resources, "*/*"))
}

// conflict tries the labels that choose, in every combination.
func (in *Injector) conflict(w *admissionregistrationv1.MutatingWebhook, namespaces []Namespace) (Conflict, bool) {
	// What cannot be read selects everything: better a conflict too many.
	ofNamespace := selector(w.NamespaceSelector)
	ofObject := selector(w.ObjectSelector)
	yet := Namespace{}
	places := slices.Clone(namespaces)
	for _, set := range in.namespaceLabels() {
		yet.Labels = set
		places = append(places, yet)
	}
	for _, ns := range places {
		set := labels.Set{}
		for k, v := range ns.Labels {
			set[k] = v
		}
		if ns.Name != "" {
			set[corev1.LabelMetadataName] = ns.Name
		}
		if !ofNamespace.Matches(set) {
			continue
		}
		for _, pod := range in.podLabels() {
			if !ofObject.Matches(labels.Set(pod)) {
				continue
			}
			// A pod that nobody gave a name yet, on its own.
			asked := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Labels: pod}}
			if wanted, _, err := in.wanted(asked, Namespace{Name: ns.Name, Labels: ns.Labels}); err == nil && wanted {
				return Conflict{Namespace: ns.Name, NamespaceLabels: ns.Labels, PodLabels: pod}, true
			}
		}
	}
	return Conflict{}, false
}

func selector(s *metav1.LabelSelector) labels.Selector {
	if s == nil {
		return labels.Everything()
	}
	out, err := metav1.LabelSelectorAsSelector(s)
	if err != nil {
		return labels.Everything()
	}
	return out
}

func (in *Injector) namespaceLabels() []map[string]string {
	return []map[string]string{
		{labelInjection: injectionEnabled}, {labelRevision: in.cfg.Revision}, {labelRevision: revisionDefault}, nil,
	}
}

func (in *Injector) podLabels() []map[string]string {
	return []map[string]string{
		nil, {labelInject: "true"}, {labelRevision: in.cfg.Revision}, {labelRevision: revisionDefault},
	}
}
