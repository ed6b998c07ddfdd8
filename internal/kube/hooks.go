package kube

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"log/slog"
	"slices"
	"time"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"castellan.dev/internal/run"
)

// Names of what the installer makes.
const (
	InjectorConfiguration  = "castellan-sidecar-injector"
	ValidatorConfiguration = "castellan-validator"
	serverService          = "castellan-server"
)

const (
	// rootLinger is how long a root stays in the caBundle after it has left the
	// bundle: API servers take a moment to see the change, and connections that they
	// have open were verified before.
	rootLinger = time.Minute
	// unreadyEvery is how often it is looked whether the webhooks have become ready.
	unreadyEvery = time.Second
)

// HooksConfig says what webhooks are trusted by.
type HooksConfig struct {
	// Roots verify the webhooks' serving certificate, with a channel that is closed at
	// their next change. Before the certificate's chain changes the new root is among
	// them beside the old: that is the authority's order of things.
	Roots func() ([]*x509.Certificate, <-chan struct{})
	// Ready returns nil once admission reviews are answered.
	Ready func() error
	Log   *slog.Logger
	Now   func() time.Time
}

// hooks keeps the two configurations.
type hooks struct {
	cfg        HooksConfig
	c          *Client
	namespace  string
	left       []leftRoot
	published  []*x509.Certificate
	mutating   hookAPI[*admissionv1.MutatingWebhookConfiguration]
	validating hookAPI[*admissionv1.ValidatingWebhookConfiguration]
}

// leftRoot was published by this server and is no longer in the bundle.
type leftRoot struct {
	cert *x509.Certificate
	at   time.Time
}

// hookAPI is what is asked of the API server.
type hookAPI[T any] interface {
	Get(ctx context.Context, name string, opts metav1.GetOptions) (T, error)
	Patch(ctx context.Context, name string, pt types.PatchType, data []byte, opts metav1.PatchOptions, subresources ...string) (T, error)
}

// KeepHooks keeps the caBundle of those webhooks that point to the server's own
// Service, however others alter it, and has the validator fail closed once it is
// trusted and ready: until then nobody waits for a server that was never there. It
// is not turned back when the server ends: policy that nobody validates is not taken.
//
// RBAC: mutatingwebhookconfigurations and validatingwebhookconfigurations of
// admissionregistration.k8s.io get, list, watch, patch; cluster-wide, by name.
func KeepHooks(c *Client, cfg HooksConfig) run.Part {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	api := c.Kubernetes().AdmissionregistrationV1()
	return func(ctx context.Context) error {
		h := &hooks{cfg: cfg, c: c, namespace: c.Namespace(), mutating: api.MutatingWebhookConfigurations(), validating: api.ValidatingWebhookConfigurations()}
		k := newKeeper("trust in the webhooks", cfg.Log, h.keep)
		wake := func(_, _ metav1.Object) { k.wake() }
		injector := c.mirror(watched{
			kind: "the injector's configuration", name: InjectorConfiguration, sample: &admissionv1.MutatingWebhookConfiguration{},
			list: listing(api.MutatingWebhookConfigurations().List), open: api.MutatingWebhookConfigurations().Watch, change: wake,
		}, k.log, cfg.Now)
		validator := c.mirror(watched{
			kind: "the validator's configuration", name: ValidatorConfiguration, sample: &admissionv1.ValidatingWebhookConfiguration{},
			list: listing(api.ValidatingWebhookConfigurations().List), open: api.ValidatingWebhookConfigurations().Watch, change: wake,
		}, k.log, cfg.Now)
		return run.All(ctx, injector.part, validator.part,
			follow(func() <-chan struct{} { _, next := cfg.Roots(); return next }, k.wake), k.Run)
	}
}

// keep puts both configurations right.
func (h *hooks) keep(ctx context.Context) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	bundle, again := h.trusted()
	if len(bundle) == 0 {
		return unreadyEvery, nil // trust in nobody is never published
	}
	ready := h.cfg.Ready()
	if ready != nil && (again == 0 || again > unreadyEvery) {
		again = unreadyEvery
	}
	return again, errors.Join(h.keepInjector(ctx, bundle), h.keepValidator(ctx, bundle, ready == nil))
}

// trusted are the roots of the bundle and those that left it lately, as PEM, and
// when the next of these is to go.
func (h *hooks) trusted() (text []byte, again time.Duration) {
	roots, _ := h.cfg.Roots()
	now := h.cfg.Now()
	holds := func(list []*x509.Certificate, c *x509.Certificate) bool { return slices.ContainsFunc(list, c.Equal) }
	for _, c := range h.published {
		if !holds(roots, c) {
			h.left = append(h.left, leftRoot{c, now})
		}
	}
	h.published = roots
	h.left = slices.DeleteFunc(h.left, func(l leftRoot) bool {
		age := now.Sub(l.at)
		return age < 0 || age >= rootLinger || holds(roots, l.cert)
	})
	for _, c := range roots {
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	for _, l := range h.left {
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: l.cert.Raw})...)
		if left := rootLinger - now.Sub(l.at); again == 0 || left < again {
			again = left
		}
	}
	return text, again
}

// hookPatch is a strategic merge: the API server merges the list by name, so that
// no other entry and no field that this program does not know is touched. With the
// resource version it fails when somebody else wrote in between.
type hookPatch struct {
	Metadata struct {
		ResourceVersion string `json:"resourceVersion"`
	} `json:"metadata"`
	Webhooks []hookEntry `json:"webhooks"`
}

type hookEntry struct {
	Name         string `json:"name"`
	ClientConfig *struct {
		CABundle []byte `json:"caBundle"`
	} `json:"clientConfig,omitempty"`
	FailurePolicy string `json:"failurePolicy,omitempty"`
}

func (h *hooks) keepInjector(ctx context.Context, bundle []byte) error {
	current, err := h.mutating.Get(ctx, InjectorConfiguration, metav1.GetOptions{})
	if err != nil {
		return absent(err)
	}
	var entries []hookEntry
	for i := range current.Webhooks {
		w := &current.Webhooks[i]
		if e, changed := h.entry(w.Name, w.ClientConfig, bundle); changed {
			entries = append(entries, e)
		}
	}
	return patchHooks(ctx, h.mutating, InjectorConfiguration, current.ResourceVersion, entries)
}

func (h *hooks) keepValidator(ctx context.Context, bundle []byte, ready bool) error {
	current, err := h.validating.Get(ctx, ValidatorConfiguration, metav1.GetOptions{})
	if err != nil {
		return absent(err)
	}
	var entries []hookEntry
	for i := range current.Webhooks {
		w := &current.Webhooks[i]
		e, changed := h.entry(w.Name, w.ClientConfig, bundle)
		if ready && h.ours(w.ClientConfig) && (w.FailurePolicy == nil || *w.FailurePolicy != admissionv1.Fail) {
			e.FailurePolicy, changed = string(admissionv1.Fail), true
		}
		if changed {
			entries = append(entries, e)
		}
	}
	return patchHooks(ctx, h.validating, ValidatorConfiguration, current.ResourceVersion, entries)
}

// absent is no error of ours: that webhook is not installed.
func absent(err error) error {
	if apierrors.IsNotFound(err) {
		return nil
	}
	return err
}

func (h *hooks) ours(cc admissionv1.WebhookClientConfig) bool {
	return cc.Service != nil && cc.Service.Namespace == h.namespace && cc.Service.Name == serverService
}

func (h *hooks) entry(name string, cc admissionv1.WebhookClientConfig, bundle []byte) (e hookEntry, changed bool) {
	e.Name = name
	if !h.ours(cc) || bytes.Equal(cc.CABundle, bundle) {
		return e, false
	}
	e.ClientConfig = &struct {
		CABundle []byte `json:"caBundle"`
	}{bundle}
	return e, true
}

func patchHooks[T any](ctx context.Context, api hookAPI[T], name, version string, entries []hookEntry) error {
	if len(entries) == 0 {
		return nil
	}
	p := hookPatch{Webhooks: entries}
	p.Metadata.ResourceVersion = version
	data, err := json.Marshal(p)
	if err != nil {
		return err
	}
	_, err = api.Patch(ctx, name, types.StrategicMergePatchType, data, metav1.PatchOptions{FieldManager: fieldManager})
	return absent(err)
}
