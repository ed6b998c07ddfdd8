package webhook_test

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"

	jsonpatch "gopkg.in/evanphx/json-patch.v4"
	admissionv1 "k8s.io/api/admission/v1"
	corev1 "k8s.io/api/core/v1"

	"castellan.dev/internal/config"
	"castellan.dev/webhook"
)

// Whatever is posted, there is one answer, and no panic behind it.
func FuzzReviews(f *testing.F) {
	for _, c := range injectCases(f) {
		pod, err := json.Marshal(c.Pod)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(true, []byte(`{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview","request":{"uid":"u","kind":{"version":"v1","kind":"Pod"},"operation":"CREATE","namespace":"shop","object":`+string(pod)+`}}`))
	}
	f.Add(false, []byte(`{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview","request":{"uid":"u","kind":{"group":"security.istio.io","version":"v1","kind":"AuthorizationPolicy"},"operation":"UPDATE","namespace":"shop","oldObject":{"metadata":{}},"object":{"apiVersion":"security.istio.io/v1","kind":"AuthorizationPolicy","metadata":{"name":"a","namespace":"shop"},"spec":{"rules":[{}]}}}}`))
	r := webhook.Handler(newInjector(f, config.Inject{}), inventory())
	f.Fuzz(func(t *testing.T, inject bool, body []byte) {
		path := webhook.ValidatePath
		if inject {
			path = webhook.InjectPath
		}
		req := httptest.NewRequest(http.MethodPost, path, strings.NewReader(string(body)))
		req.Header.Set("Content-Type", "application/json")
		w := httptest.NewRecorder()
		r.ServeHTTP(w, req)
		switch w.Code {
		case http.StatusOK:
		case http.StatusBadRequest, http.StatusRequestEntityTooLarge:
			return
		default:
			t.Fatalf("%d %s", w.Code, w.Body)
		}
		var review admissionv1.AdmissionReview
		if err := json.Unmarshal(w.Body.Bytes(), &review); err != nil || review.Response == nil || review.Response.UID == "" {
			t.Fatalf("%v: %s", err, w.Body)
		}
		got := review.Response
		if got.Allowed == (got.Result != nil) || !got.Allowed && got.Patch != nil || got.Result != nil && got.Result.Code == http.StatusInternalServerError {
			t.Fatalf("%s", w.Body)
		}
		for _, warning := range got.Warnings {
			if len(warning) > 256 {
				t.Fatalf("%d bytes: %s", len(warning), warning)
			}
		}
		if got.Patch == nil {
			return
		}
		if _, err := jsonpatch.DecodePatch(got.Patch); err != nil {
			t.Fatal(err)
		}
	})
}

// An annotation either refuses the pod or becomes values that the proxy takes, in a
// sidecar that is otherwise the same.
func FuzzAnnotations(f *testing.F) {
	for _, c := range injectCases(f) {
		for name, value := range c.Pod.Annotations {
			f.Add(name, value)
		}
	}
	in := newInjector(f, config.Inject{})
	f.Fuzz(func(t *testing.T, name, value string) {
		pod := &corev1.Pod{Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "app", Image: "a"}}}}
		pod.Annotations = map[string]string{name: value}
		result, err := in.Inject(pod, webhook.Namespace{Name: "shop", Selected: true})
		if err != nil || result.Decision != webhook.Injected {
			return
		}
		var proxy *corev1.Container
		for _, list := range [][]corev1.Container{result.Pod.Spec.InitContainers, result.Pod.Spec.Containers} {
			for i := range list {
				if list[i].Name == "istio-proxy" {
					proxy = &list[i]
				}
			}
		}
		if proxy == nil || len(proxy.Env) != 1 || len(proxy.Args) != 2 || len(proxy.Command) != 1 || len(proxy.VolumeMounts) != 2 {
			t.Fatalf("%+v", proxy)
		}
		s := proxy.SecurityContext
		if *s.RunAsUser != 1337 || *s.Privileged || *s.AllowPrivilegeEscalation || len(s.Capabilities.Add) != 0 {
			t.Fatalf("%+v", s)
		}
		if strings.ContainsAny(proxy.Image, " \n\"'$") {
			t.Fatalf("image %q", proxy.Image)
		}
		var doc config.Proxy
		if err := config.Unmarshal([]byte(proxy.Env[0].Value), &doc); err != nil {
			t.Fatal(err)
		}
		if err := doc.Validate(); err != nil {
			t.Fatal(err)
		}
		for _, r := range doc.Capture.ExcludeOutboundIPRanges {
			if _, err := netip.ParsePrefix(r); err != nil {
				if _, err := netip.ParseAddr(r); err != nil {
					t.Fatal(err)
				}
			}
		}
	})
}
