package install

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"slices"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

// worn is the part of its life after which a root should have been renewed.
const worn = 0.8

// checkTrust: the published roots are valid, and the API server trusts our webhooks
// by them.
func (in *Installer) checkTrust(ctx context.Context, _ *cluster, out *results) {
	roots, ok := in.checkRoots(ctx, out)
	for _, r := range []ref{
		{Kind: "MutatingWebhookConfiguration", Name: "castellan-sidecar-injector"},
		{Kind: "ValidatingWebhookConfiguration", Name: "castellan-validator"},
	} {
		live, err := in.get(ctx, r)
		switch {
		case err != nil:
			out.unknown(r.Name, err)
		case live != nil:
			in.checkWebhook(r.Name, live, roots, ok, out)
		}
	}
}

func (in *Installer) checkRoots(ctx context.Context, out *results) ([]*x509.Certificate, bool) {
	const check = "published roots"
	cm, err := in.get(ctx, ref{Kind: "ConfigMap", Namespace: in.cfg.Namespace, Name: "castellan-bundle"})
	if err != nil {
		out.unknown(check, err)
		return nil, false
	}
	if cm == nil {
		out.fail(check, "castellan install", "the ConfigMap castellan-bundle does not exist; agents have no roots to trust")
		return nil, false
	}
	text, _, _ := unstructured.NestedString(cm.Object, "data", "bundle.pem")
	roots, err := certificates([]byte(text))
	if err != nil || len(roots) == 0 {
		out.fail(check, "the server publishes them once its authority is there; read its log", "the ConfigMap castellan-bundle holds none (%v)", err)
		return nil, false
	}
	now := in.cfg.Now()
	for _, c := range roots {
		left := c.NotAfter.Sub(now)
		switch used := 1 - left.Seconds()/c.NotAfter.Sub(c.NotBefore).Seconds(); {
		case left <= 0:
			out.fail(check, "castellan ca status", "%s expired at %s", c.Subject, c.NotAfter.UTC().Format(time.RFC3339))
			return roots, true
		case c.NotBefore.After(now):
			out.fail(check, "is a clock wrong?", "%s is not valid yet", c.Subject)
			return roots, true
		case used > worn:
			out.warn(check, "rotate the root", "%s has %s left", c.Subject, left.Round(time.Hour))
			return roots, true
		}
	}
	first := slices.MinFunc(roots, func(a, b *x509.Certificate) int { return a.NotAfter.Compare(b.NotAfter) })
	out.ok(check, "%s, valid until %s", count(len(roots), "root"), first.NotAfter.UTC().Format(time.DateOnly))
	return roots, true
}

func (in *Installer) checkWebhook(name string, live *unstructured.Unstructured, roots []*x509.Certificate, known bool, out *results) {
	hooks, _, err := unstructured.NestedSlice(live.Object, "webhooks")
	if err != nil {
		out.unknown(name, err)
		return
	}
	policies := map[string]bool{}
	for _, h := range hooks {
		hook, ok := h.(map[string]any)
		if !ok {
			continue
		}
		encoded, _, _ := unstructured.NestedString(hook, "clientConfig", "caBundle")
		if why := in.untrusted(encoded, roots, known); why != "" {
			out.fail(name, "the server puts its roots into it while it runs and is the leader; read its log", "%v: %s", hook["name"], why)
			return
		}
		policies[fmt.Sprint(hook["failurePolicy"])] = true
	}
	if policies["Ignore"] && live.GetKind() == "ValidatingWebhookConfiguration" {
		out.warn(name, "the server turns it to Fail once it answers", "failures are ignored: a policy that cannot be enforced may be written")
		return
	}
	out.ok(name, "trusted by the API server")
}

// untrusted says why the API server would not trust our certificate, empty if it would.
func (in *Installer) untrusted(caBundle string, roots []*x509.Certificate, known bool) string {
	data, err := base64.StdEncoding.DecodeString(caBundle)
	if err != nil {
		return "its caBundle cannot be read"
	}
	bundle, err := certificates(data)
	if err != nil || len(bundle) == 0 {
		return "it has no caBundle"
	}
	for _, c := range bundle {
		now := in.cfg.Now()
		valid := now.After(c.NotBefore) && now.Before(c.NotAfter)
		if valid && (!known || slices.ContainsFunc(roots, c.Equal)) {
			return ""
		}
	}
	return "its caBundle has none of the published roots that is valid"
}

// certificates reads PEM, refusing what is no certificate.
func certificates(data []byte) ([]*x509.Certificate, error) {
	var out []*x509.Certificate
	for {
		var block *pem.Block
		block, data = pem.Decode(data)
		if block == nil {
			if rest := bytes.TrimSpace(data); len(rest) > 0 && !strings.HasPrefix(string(rest), "#") {
				return nil, fmt.Errorf("%d bytes that are no PEM", len(rest))
			}
			return out, nil
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		out = append(out, c)
	}
}
