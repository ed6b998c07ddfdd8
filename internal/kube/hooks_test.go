package kube_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"sync/atomic"
	"testing"
	"time"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"castellan.dev/internal/kube"
)

func newRoot(t *testing.T, name string) *x509.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func pemOf(certs ...*x509.Certificate) []byte {
	var out []byte
	for _, c := range certs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return out
}

func ourService(path string) admissionv1.WebhookClientConfig {
	return admissionv1.WebhookClientConfig{Service: &admissionv1.ServiceReference{Namespace: namespace, Name: "castellan-server", Path: &path}}
}

func hookConfigurations() (*admissionv1.MutatingWebhookConfiguration, *admissionv1.ValidatingWebhookConfiguration) {
	ignore, fail := admissionv1.Ignore, admissionv1.Fail
	url := "https://elsewhere.test"
	other := admissionv1.WebhookClientConfig{Service: &admissionv1.ServiceReference{Namespace: "istio-system", Name: "istiod"}, CABundle: []byte("theirs")}
	return &admissionv1.MutatingWebhookConfiguration{
			ObjectMeta: metav1.ObjectMeta{Name: "castellan-sidecar-injector"},
			Webhooks: []admissionv1.MutatingWebhook{
				{Name: "namespace.sidecar-injector.castellan.dev", ClientConfig: ourService("/inject"), FailurePolicy: &fail},
				{Name: "other.sidecar-injector.castellan.dev", ClientConfig: other, FailurePolicy: &ignore},
				{Name: "object.sidecar-injector.castellan.dev", ClientConfig: ourService("/inject"), FailurePolicy: &ignore},
			},
		}, &admissionv1.ValidatingWebhookConfiguration{
			ObjectMeta: metav1.ObjectMeta{Name: "castellan-validator"},
			Webhooks: []admissionv1.ValidatingWebhook{
				{Name: "validation.castellan.dev", ClientConfig: ourService("/validate"), FailurePolicy: &ignore},
				{Name: "elsewhere.castellan.dev", ClientConfig: admissionv1.WebhookClientConfig{URL: &url, CABundle: []byte("theirs")}, FailurePolicy: &ignore},
			},
		}
}

// TestHooksAreKept: the caBundle of our own entries follows the roots, old beside
// new for a while, and is put right when altered; the validator fails closed once
// ready, the injector's policy is the installer's, and others' entries are theirs.
func TestHooksAreKept(t *testing.T) {
	mutating, validating := hookConfigurations()
	c := newCluster(t, mutating, validating)
	api := c.Clientset.AdmissionregistrationV1()
	a, b := newRoot(t, "a"), newRoot(t, "b")
	roots := newValue([]*x509.Certificate{a})
	var ready atomic.Bool
	var offset atomic.Int64
	stop := startPart(t, kube.KeepHooks(c.client(), kube.HooksConfig{
		Roots: roots.get,
		Ready: func() error {
			if !ready.Load() {
				return errors.New("not yet")
			}
			return nil
		},
		Now: func() time.Time { return time.Now().Add(time.Duration(offset.Load())) },
	}))
	injector := func() *admissionv1.MutatingWebhookConfiguration {
		t.Helper()
		m, err := api.MutatingWebhookConfigurations().Get(t.Context(), "castellan-sidecar-injector", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	validator := func() *admissionv1.ValidatingWebhookConfiguration {
		t.Helper()
		v, err := api.ValidatingWebhookConfigurations().Get(t.Context(), "castellan-validator", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	trusted := func(want ...*x509.Certificate) {
		t.Helper()
		text := pemOf(want...)
		within30s(t, "trust", func() bool {
			m, v := injector(), validator()
			return bytes.Equal(m.Webhooks[0].ClientConfig.CABundle, text) && bytes.Equal(m.Webhooks[2].ClientConfig.CABundle, text) &&
				bytes.Equal(v.Webhooks[0].ClientConfig.CABundle, text)
		})
	}
	trusted(a)
	if p := *validator().Webhooks[0].FailurePolicy; p != admissionv1.Ignore {
		t.Errorf("the validator's policy is %s before it is ready", p)
	}
	ready.Store(true)
	within30s(t, "the validator fails closed", func() bool { return *validator().Webhooks[0].FailurePolicy == admissionv1.Fail })
	roots.set([]*x509.Certificate{a, b})
	trusted(a, b)
	roots.set([]*x509.Certificate{b})
	trusted(b, a) // the old one stays a while
	offset.Store(int64(2 * time.Minute))
	m := injector().DeepCopy()
	m.Webhooks[0].ClientConfig.CABundle = []byte("junk")
	m.Labels = map[string]string{"kept": "yes"}
	if _, err := api.MutatingWebhookConfigurations().Update(t.Context(), m, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	trusted(b)
	v := validator().DeepCopy()
	ignore := admissionv1.Ignore
	v.Webhooks[0].FailurePolicy = &ignore
	if _, err := api.ValidatingWebhookConfigurations().Update(t.Context(), v, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	within30s(t, "the validator fails closed again", func() bool { return *validator().Webhooks[0].FailurePolicy == admissionv1.Fail })
	roots.set(nil)
	if err := stop(); err != nil {
		t.Error(err)
	}
	m, v = injector(), validator()
	if string(m.Webhooks[1].ClientConfig.CABundle) != "theirs" || string(v.Webhooks[1].ClientConfig.CABundle) != "theirs" ||
		*v.Webhooks[1].FailurePolicy != admissionv1.Ignore || m.Labels["kept"] != "yes" {
		t.Error("what is not ours was changed")
	}
	if *m.Webhooks[0].FailurePolicy != admissionv1.Fail || *m.Webhooks[2].FailurePolicy != admissionv1.Ignore {
		t.Error("the injector's policy was changed")
	}
	if n := len(m.Webhooks) + len(v.Webhooks); n != 5 {
		t.Errorf("%d entries", n)
	}
}

// TestHooksNotInstalled: without the configurations there is nothing to do; they are
// found when they come.
func TestHooksNotInstalled(t *testing.T) {
	c := newCluster(t)
	root := newRoot(t, "a")
	startPart(t, kube.KeepHooks(c.client(), kube.HooksConfig{
		Roots: newValue([]*x509.Certificate{root}).get, Ready: func() error { return nil },
	}))
	within30s(t, "they are asked for", func() bool { return c.count("get", "validatingwebhookconfigurations") > 0 })
	mutating, _ := hookConfigurations()
	if _, err := c.Clientset.AdmissionregistrationV1().MutatingWebhookConfigurations().Create(t.Context(), mutating, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	within30s(t, "trust", func() bool {
		m, err := c.Clientset.AdmissionregistrationV1().MutatingWebhookConfigurations().Get(t.Context(), "castellan-sidecar-injector", metav1.GetOptions{})
		return err == nil && bytes.Equal(m.Webhooks[0].ClientConfig.CABundle, pemOf(root))
	})
}
