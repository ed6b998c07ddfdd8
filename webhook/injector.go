package webhook

import (
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"

	"castellan.dev/internal/config"
)

// Injector decides about pods and puts the sidecar into them. It is immutable.
type Injector struct {
	cfg       config.Inject
	namespace string
	excluded  []string
	resources corev1.ResourceRequirements
}

// NewInjector checks cfg; namespace is Castellan's own, which is never injected.
func NewInjector(cfg config.Inject, namespace string) (*Injector, error) {
	whole := config.Webhook{Inject: cfg}
	if err := whole.Check(); err != nil {
		return nil, err
	}
	cfg = whole.Inject
	if namespace == "" {
		return nil, fmt.Errorf("webhook: whose namespace is Castellan's own is not said")
	}
	if err := checkImage(cfg.Image); err != nil {
		return nil, fmt.Errorf("webhook.inject.image: %q: %w", cfg.Image, err)
	}
	in := &Injector{cfg: cfg, namespace: namespace, excluded: append([]string{namespace}, systemNamespaces()...)}
	in.excluded = append(in.excluded, cfg.ExcludeNamespaces...)
	for _, q := range []struct {
		field, value string
		name         corev1.ResourceName
		list         *corev1.ResourceList
	}{
		{"requests.cpu", cfg.Requests.CPU, corev1.ResourceCPU, &in.resources.Requests},
		{"requests.memory", cfg.Requests.Memory, corev1.ResourceMemory, &in.resources.Requests},
		{"limits.cpu", cfg.Limits.CPU, corev1.ResourceCPU, &in.resources.Limits},
		{"limits.memory", cfg.Limits.Memory, corev1.ResourceMemory, &in.resources.Limits},
	} {
		if q.value == "" {
			continue
		}
		quantity, err := parseQuantity(q.value)
		if err != nil {
			return nil, fmt.Errorf("webhook.inject.%s: %w", q.field, err)
		}
		setQuantity(q.list, q.name, quantity)
	}
	if err := checkResources(in.resources); err != nil {
		return nil, fmt.Errorf("webhook.inject: %w", err)
	}
	return in, nil
}

func setQuantity(list *corev1.ResourceList, name corev1.ResourceName, q resource.Quantity) {
	if *list == nil {
		*list = corev1.ResourceList{}
	}
	(*list)[name] = q
}

// Decision is what became of a pod.
type Decision string

// Decisions.
const (
	Injected Decision = "injected"
	// Skipped pods run as they are, outside the mesh.
	Skipped Decision = "skipped"
)

// Result is the answer about one pod.
type Result struct {
	Decision Decision
	// Reason says why a pod was skipped.
	Reason string
	// Pod is the pod as it should be; the one that was given where it was skipped.
	Pod *corev1.Pod
	// Warnings are for whoever creates the pod.
	Warnings []string
}

// Refusal is why a pod cannot be injected: it must not run, because it would not
// run as its author asked.
type Refusal struct {
	// Field is the annotation, label or field that was refused, Value what it said.
	Field, Value string
	Reason       string
}

// Error returns one line for the pod's author.
func (r *Refusal) Error() string {
	var b strings.Builder
	if r.Field != "" {
		b.WriteString(r.Field + ": ")
	}
	if r.Value != "" {
		fmt.Fprintf(&b, "%q: ", shorten(r.Value))
	}
	return b.String() + r.Reason
}

func refusef(field, value, format string, args ...any) *Refusal {
	return &Refusal{Field: field, Value: value, Reason: fmt.Sprintf(format, args...)}
}

// maxShown bounds what is repeated of a value.
const maxShown = 128

func shorten(s string) string {
	if len(s) <= maxShown {
		return s
	}
	return strings.ToValidUTF8(s[:maxShown], "") + "…"
}

// Inject returns the pod with the sidecar in it, or says that it gets none. The
// pod given is not changed. To inject what is injected already changes nothing,
// unless the configuration did. The error is a *Refusal.
func (in *Injector) Inject(pod *corev1.Pod, ns Namespace) (Result, error) {
	wanted, reason, err := in.wanted(pod, ns)
	if err != nil {
		return Result{}, err
	}
	if !wanted {
		return Result{Decision: Skipped, Reason: reason, Pod: pod}, nil
	}
	p := pod.DeepCopy()
	if err := strip(p); err != nil {
		return Result{}, err
	}
	opts, err := in.options(p)
	if err != nil {
		return Result{}, err
	}
	if err := checkPod(p, opts); err != nil {
		return Result{}, err
	}
	if err := in.build(p, ns, opts); err != nil {
		return Result{}, err
	}
	return Result{Decision: Injected, Pod: p, Warnings: opts.warnings}, nil
}

// build changes p, which was found good.
func (in *Injector) build(p *corev1.Pod, ns Namespace, opts *options) error {
	probes, err := rewriteProbes(p, opts)
	if err != nil {
		return err
	}
	document, err := proxyDocument(opts, probes)
	if err != nil {
		return err
	}
	if err := shareSocket(p, opts); err != nil {
		return err
	}
	addMetadata(p, opts)
	addContainers(p, opts, document)
	addVolumes(p)
	for _, name := range in.cfg.ImagePullSecrets {
		ref := corev1.LocalObjectReference{Name: name}
		if !slices.Contains(p.Spec.ImagePullSecrets, ref) {
			p.Spec.ImagePullSecrets = append(p.Spec.ImagePullSecrets, ref)
		}
	}
	addStatus(p, opts, in.cfg)
	warnOfNamespace(ns, opts)
	return nil
}
