package webhook

import (
	"slices"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"castellan.dev/api/policy"
)

// Names of the two configurations, and of the service they lead to.
const (
	InjectorConfiguration  = "castellan-sidecar-injector"
	ValidatorConfiguration = "castellan-validator"

	serviceName    = "castellan-server"
	servicePort    = 443
	timeoutSeconds = 10
)

// Configurations returns what the API server is to be told: which pods and policies
// it asks about. The chart installs the same, and a test holds it to this.
//
// The certificate bundles are missing and the validator ignores failures: the
// server fills in the one and turns round the other once it can answer.
func (in *Injector) Configurations() (*admissionregistrationv1.MutatingWebhookConfiguration, *admissionregistrationv1.ValidatingWebhookConfiguration) {
	m := &admissionregistrationv1.MutatingWebhookConfiguration{
		TypeMeta:   metav1.TypeMeta{APIVersion: admissionregistrationv1.SchemeGroupVersion.String(), Kind: "MutatingWebhookConfiguration"},
		ObjectMeta: metav1.ObjectMeta{Name: InjectorConfiguration},
	}
	revisions := []string{in.cfg.Revision}
	if in.defaultRevision() {
		revisions = append(revisions, revisionDefault)
	}
	notOff := expression(labelInject, metav1.LabelSelectorOpNotIn, "false")
	noInjection := expression(labelInjection, metav1.LabelSelectorOpDoesNotExist)
	noRevision := expression(labelRevision, metav1.LabelSelectorOpDoesNotExist)
	m.Webhooks = []admissionregistrationv1.MutatingWebhook{
		in.mutating("rev.namespace", terms(expression(labelRevision, metav1.LabelSelectorOpIn, revisions...), noInjection), terms(notOff)),
		in.mutating("rev.object", terms(noRevision, noInjection), terms(notOff, expression(labelRevision, metav1.LabelSelectorOpIn, revisions...))),
	}
	if in.defaultRevision() {
		m.Webhooks = append(m.Webhooks,
			in.mutating("namespace", terms(expression(labelInjection, metav1.LabelSelectorOpIn, injectionEnabled)), terms(notOff)),
			in.mutating("object", terms(noInjection, noRevision), terms(expression(labelInject, metav1.LabelSelectorOpIn, "true"), noRevision)))
	}
	return m, in.validating()
}

func expression(key string, op metav1.LabelSelectorOperator, values ...string) metav1.LabelSelectorRequirement {
	return metav1.LabelSelectorRequirement{Key: key, Operator: op, Values: values}
}

func terms(list ...metav1.LabelSelectorRequirement) []metav1.LabelSelectorRequirement { return list }

// mutating asks about new pods. Namespaces are left out by the label that the API
// server itself keeps, so that what brings the cluster up, and Castellan, never
// waits for an injector that is not there yet; and so are pods of the node's
// network, which would get no sidecar.
func (in *Injector) mutating(prefix string, namespaces, pods []metav1.LabelSelectorRequirement) admissionregistrationv1.MutatingWebhook {
	scope := admissionregistrationv1.NamespacedScope
	fail, none := admissionregistrationv1.Fail, admissionregistrationv1.SideEffectClassNone
	equivalent, never := admissionregistrationv1.Equivalent, admissionregistrationv1.NeverReinvocationPolicy
	timeout := int32(timeoutSeconds)
	excluded := expression(corev1.LabelMetadataName, metav1.LabelSelectorOpNotIn, slices.Compact(slices.Sorted(slices.Values(in.excluded)))...)
	return admissionregistrationv1.MutatingWebhook{
		Name:         prefix + ".sidecar-injector.castellan.dev",
		ClientConfig: in.client(InjectPath),
		Rules: []admissionregistrationv1.RuleWithOperations{{
			Operations: []admissionregistrationv1.OperationType{admissionregistrationv1.Create},
			Rule:       admissionregistrationv1.Rule{APIGroups: []string{""}, APIVersions: []string{"v1"}, Resources: []string{"pods"}, Scope: &scope},
		}},
		FailurePolicy:           &fail,
		MatchPolicy:             &equivalent,
		NamespaceSelector:       &metav1.LabelSelector{MatchExpressions: append(namespaces, excluded)},
		ObjectSelector:          &metav1.LabelSelector{MatchExpressions: pods},
		SideEffects:             &none,
		TimeoutSeconds:          &timeout,
		AdmissionReviewVersions: []string{"v1"},
		ReinvocationPolicy:      &never,
		MatchConditions: []admissionregistrationv1.MatchCondition{{
			Name: "exclude-host-network", Expression: "!has(object.spec.hostNetwork) || !object.spec.hostNetwork",
		}},
	}
}

// validating asks about policies of which something is new. It cannot keep one from
// being deleted: deletions are not asked about, and neither are updates of
// finalizers and other metadata.
func (in *Injector) validating() *admissionregistrationv1.ValidatingWebhookConfiguration {
	scope := admissionregistrationv1.NamespacedScope
	ignore, none := admissionregistrationv1.Ignore, admissionregistrationv1.SideEffectClassNone
	equivalent := admissionregistrationv1.Equivalent
	timeout := int32(timeoutSeconds)
	return &admissionregistrationv1.ValidatingWebhookConfiguration{
		TypeMeta:   metav1.TypeMeta{APIVersion: admissionregistrationv1.SchemeGroupVersion.String(), Kind: "ValidatingWebhookConfiguration"},
		ObjectMeta: metav1.ObjectMeta{Name: ValidatorConfiguration},
		Webhooks: []admissionregistrationv1.ValidatingWebhook{{
			Name:         "validation.castellan.dev",
			ClientConfig: in.client(ValidatePath),
			Rules: []admissionregistrationv1.RuleWithOperations{{
				Operations: []admissionregistrationv1.OperationType{admissionregistrationv1.Create, admissionregistrationv1.Update},
				Rule: admissionregistrationv1.Rule{
					APIGroups: []string{policy.Group}, APIVersions: []string{"v1", "v1beta1"},
					Resources: []string{"authorizationpolicies", "peerauthentications", "requestauthentications"}, Scope: &scope,
				},
			}},
			FailurePolicy:           &ignore,
			MatchPolicy:             &equivalent,
			SideEffects:             &none,
			TimeoutSeconds:          &timeout,
			AdmissionReviewVersions: []string{"v1"},
			// The generation grows with the spec, and with nothing else.
			MatchConditions: []admissionregistrationv1.MatchCondition{{
				Name: "something-new",
				Expression: "request.operation != 'UPDATE' || object.metadata.generation != oldObject.metadata.generation" +
					" || object.metadata.?annotations['istio.io/dry-run'] != oldObject.metadata.?annotations['istio.io/dry-run']",
			}},
		}},
	}
}

func (in *Injector) client(path string) admissionregistrationv1.WebhookClientConfig {
	port := int32(servicePort)
	return admissionregistrationv1.WebhookClientConfig{Service: &admissionregistrationv1.ServiceReference{
		Namespace: in.namespace, Name: serviceName, Path: &path, Port: &port,
	}}
}
