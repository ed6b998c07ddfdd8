package config

import (
	"errors"
	"fmt"
	"net"
	"strings"
	"time"

	"castellan.dev/identity"
)

// Webhook configures the admission webhooks: sidecar injection and validation of policy.
type Webhook struct {
	// Listen is the host:port of /inject and /validate; default ":15017".
	Listen string `json:"listen,omitempty"`
	Inject Inject `json:"inject,omitzero"`
}

// Inject says which pods get a sidecar and what it is like. Quantities of
// resources are written as in Kubernetes; whoever serves the webhook parses them.
type Inject struct {
	// Revision is the value of the label istio.io/rev, of a namespace or a pod, that
	// asks for our sidecar; default "castellan".
	Revision string `json:"revision,omitempty"`
	// DefaultRevision makes us the injector of whoever names no revision:
	// istio-injection=enabled, sidecar.istio.io/inject=true and istio.io/rev=default;
	// default true. Turned off, Istio can be it beside us.
	DefaultRevision *bool `json:"defaultRevision,omitempty"`
	// ExcludeNamespaces get no sidecar, nor do kube-system, kube-public,
	// kube-node-lease, local-path-storage and our own.
	ExcludeNamespaces []string `json:"excludeNamespaces,omitempty"`

	// Image of castellan-proxy; default docker.io/castellan/castellan-proxy:dev.
	Image string `json:"image,omitempty"`
	// ImagePullPolicy is Always, IfNotPresent or Never; default IfNotPresent.
	ImagePullPolicy string `json:"imagePullPolicy,omitempty"`
	// ImagePullSecrets are added to the pod's own; they must exist in its namespace.
	ImagePullSecrets []string `json:"imagePullSecrets,omitempty"`

	// NativeSidecar makes the proxy an init container that is restarted always, which
	// starts before the application and ends after it; default true.
	NativeSidecar *bool `json:"nativeSidecar,omitempty"`
	// HoldApplication puts the proxy first among the containers where it is no native
	// sidecar. Kubernetes does not wait for it to be ready.
	HoldApplication bool `json:"holdApplication,omitempty"`
	// RewriteProbes lets the kubelet ask the proxy, as it has no certificate for the
	// application's ports; default true.
	RewriteProbes *bool `json:"rewriteProbes,omitempty"`

	Requests ProxyResources `json:"requests,omitzero"` // default 10m, 32Mi
	Limits   ProxyResources `json:"limits,omitzero"`   // default none
	// LogLevel is debug, info, warn or error; default info.
	LogLevel string `json:"logLevel,omitempty"`
	// DrainTimeout is how long live requests may take at the pod's end; default 5s.
	DrainTimeout Duration       `json:"drainTimeout,omitempty"`
	Capture      CaptureDefault `json:"capture,omitzero"`
}

// ProxyResources are what the sidecar and its init step ask for.
type ProxyResources struct {
	CPU    string `json:"cpu,omitempty"`
	Memory string `json:"memory,omitempty"`
}

// CaptureDefault is what holds for pods whose annotations do not say otherwise.
type CaptureDefault struct {
	ExcludeInboundPorts     PortList `json:"excludeInboundPorts,omitempty"`
	ExcludeOutboundPorts    PortList `json:"excludeOutboundPorts,omitempty"`
	IncludeOutboundIPRanges []string `json:"includeOutboundIPRanges,omitempty"`
	ExcludeOutboundIPRanges []string `json:"excludeOutboundIPRanges,omitempty"`
}

// On returns what an optional switch says, or else its default.
func On(v *bool, def bool) bool {
	if v == nil {
		return def
	}
	return *v
}

func (w *Webhook) setDefaults() {
	setDefault(&w.Listen, ":15017")
	i := &w.Inject
	setDefault(&i.Revision, "castellan")
	setDefault(&i.Image, "docker.io/castellan/castellan-proxy:dev")
	setDefault(&i.ImagePullPolicy, "IfNotPresent")
	setDefault(&i.LogLevel, "info")
	setDefault(&i.DrainTimeout, Duration(5*time.Second))
	if i.Requests == (ProxyResources{}) {
		i.Requests = ProxyResources{CPU: "10m", Memory: "32Mi"}
	}
}

func (s *Server) checkWebhook() error {
	if s.Webhook == nil {
		return nil
	}
	if s.Kubernetes == nil {
		return errors.New("webhook: there is none without kubernetes")
	}
	return s.Webhook.validate()
}

// Check fills defaults and validates what needs no Kubernetes types.
func (w *Webhook) Check() error {
	w.setDefaults()
	return w.validate()
}

func (w *Webhook) validate() error {
	if _, _, err := net.SplitHostPort(w.Listen); err != nil {
		return fmt.Errorf("webhook.listen: %w", err)
	}
	if err := w.Inject.validate(); err != nil {
		return fmt.Errorf("webhook.inject.%w", err)
	}
	return nil
}

func (i *Inject) validate() error {
	// A revision is a label's value, and ours are names that a namespace could have.
	if _, err := identity.NewAccount(i.Revision, "default"); err != nil || i.Revision == "default" {
		return fmt.Errorf(`revision: %q, want an RFC 1123 label other than "default"`, i.Revision)
	}
	for n, ns := range i.ExcludeNamespaces {
		if _, err := identity.NewAccount(ns, "default"); err != nil {
			return fmt.Errorf("excludeNamespaces[%d]: %q is no name of a namespace", n, ns)
		}
	}
	switch i.ImagePullPolicy {
	case "Always", "IfNotPresent", "Never":
	default:
		return fmt.Errorf("imagePullPolicy: %q, want Always, IfNotPresent or Never", i.ImagePullPolicy)
	}
	for n, name := range i.ImagePullSecrets {
		if _, err := identity.NewAccount("default", name); err != nil {
			return fmt.Errorf("imagePullSecrets[%d]: %q is no name of an object", n, name)
		}
	}
	if i.DrainTimeout < 0 {
		return errors.New("drainTimeout: must not be negative")
	}
	if err := (Log{Level: i.LogLevel}).validate(); err != nil {
		return errors.New(strings.Replace(err.Error(), "log.level", "logLevel", 1))
	}
	return i.Capture.validate()
}

func (c CaptureDefault) validate() error {
	as := Capture{
		Inbound: 15006, Outbound: 15001,
		ExcludeInboundPorts: c.ExcludeInboundPorts, ExcludeOutboundPorts: c.ExcludeOutboundPorts,
		IncludeOutboundIPRanges: c.IncludeOutboundIPRanges, ExcludeOutboundIPRanges: c.ExcludeOutboundIPRanges,
	}
	if err := as.validate(); err != nil {
		return fmt.Errorf("capture.%w", err)
	}
	return nil
}
