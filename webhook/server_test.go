package webhook_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"go.uber.org/goleak"
	jsonpatch "gopkg.in/evanphx/json-patch.v4"
	admissionv1 "k8s.io/api/admission/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"castellan.dev/internal/config"
	"castellan.dev/internal/workloads"
	"castellan.dev/webhook"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// certificate makes one for localhost.
func certificate(t testing.TB, serial int64) *tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(serial), DNSNames: []string{"localhost"}, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// running is a server under test.
type running struct {
	*webhook.Server
	url      string
	cert     atomic.Pointer[tls.Certificate]
	client   *http.Client
	registry *prometheus.Registry
	log      *lockedBuffer
	stop     func() error
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func start(t testing.TB, change func(*webhook.Config)) *running {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &running{url: "https://" + l.Addr().String(), registry: prometheus.NewRegistry(), log: &lockedBuffer{}}
	r.cert.Store(certificate(t, 1))
	cfg := webhook.Config{
		Listener:       l,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return r.cert.Load(), nil },
		Injector:       newInjector(t, config.Inject{}),
		Log:            slog.New(slog.NewJSONHandler(r.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
		Registerer:     r.registry,
	}
	if change != nil {
		change(&cfg)
	}
	if r.Server, err = webhook.New(cfg); err != nil {
		t.Fatal(err)
	}
	transport := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, ForceAttemptHTTP2: true}
	r.client = &http.Client{Transport: transport, Timeout: time.Minute}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- r.Run(ctx) }()
	r.stop = sync.OnceValue(func() error {
		cancel()
		transport.CloseIdleConnections()
		return <-ended
	})
	t.Cleanup(func() {
		if err := r.stop(); err != nil {
			t.Error(err)
		}
	})
	return r
}

func (r *running) post(t testing.TB, path, contentType string, body io.Reader) (int, string) {
	t.Helper()
	resp, err := r.client.Post(r.url+path, contentType, body)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(data)
}

// review sends one as the API server does.
func (r *running) review(t testing.TB, path string, req *admissionv1.AdmissionRequest) *admissionv1.AdmissionResponse {
	t.Helper()
	if req.UID == "" {
		req.UID = "uid-1"
	}
	body, err := json.Marshal(admissionv1.AdmissionReview{TypeMeta: metav1.TypeMeta{APIVersion: "admission.k8s.io/v1", Kind: "AdmissionReview"}, Request: req})
	if err != nil {
		t.Fatal(err)
	}
	code, answer := r.post(t, path+"?timeout=10s", "application/json", bytes.NewReader(body))
	if code != http.StatusOK {
		t.Fatalf("%d %s", code, answer)
	}
	var got admissionv1.AdmissionReview
	if err := json.Unmarshal([]byte(answer), &got); err != nil {
		t.Fatal(err)
	}
	if got.Kind != "AdmissionReview" || got.APIVersion != "admission.k8s.io/v1" || got.Request != nil || got.Response == nil || got.Response.UID != req.UID {
		t.Fatalf("%s", answer)
	}
	return got.Response
}

func (r *running) count(t testing.TB, hook, result string) float64 {
	t.Helper()
	families, err := r.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != "castellan_webhook_reviews_total" {
			continue
		}
		for _, m := range f.GetMetric() {
			if label(m, "webhook") == hook && label(m, "result") == result {
				return m.GetCounter().GetValue()
			}
		}
	}
	return 0
}

func label(m *dto.Metric, name string) string {
	for _, l := range m.GetLabel() {
		if l.GetName() == name {
			return l.GetValue()
		}
	}
	return ""
}

func podRequest(pod string) *admissionv1.AdmissionRequest {
	return &admissionv1.AdmissionRequest{
		Kind: metav1.GroupVersionKind{Version: "v1", Kind: "Pod"}, Operation: admissionv1.Create, Namespace: "shop",
		Object: runtime.RawExtension{Raw: []byte(pod)},
	}
}

const smallPod = `{"apiVersion":"v1","kind":"Pod","metadata":{"generateName":"a-","namespace":"kube-system"},"spec":{"containers":[{"name":"app","image":"a"}]}}`

func TestInjectOverHTTP(t *testing.T) {
	r := start(t, nil)
	// The namespace is the request's: this object's own word would spare it.
	got := r.review(t, webhook.InjectPath, podRequest(smallPod))
	if !got.Allowed || got.PatchType == nil || *got.PatchType != admissionv1.PatchTypeJSONPatch {
		t.Fatalf("%+v", got)
	}
	patch, err := jsonpatch.DecodePatch(got.Patch)
	if err != nil {
		t.Fatal(err)
	}
	patched, err := patch.Apply([]byte(smallPod))
	if err != nil {
		t.Fatal(err)
	}
	var pod corev1.Pod
	if err := json.Unmarshal(patched, &pod); err != nil || len(pod.Spec.InitContainers) != 2 || pod.Labels["security.istio.io/tlsMode"] != "istio" {
		t.Fatalf("%s %v", patched, err)
	}
	dry := true
	req := podRequest(smallPod)
	req.DryRun = &dry
	if again := r.review(t, webhook.InjectPath, req); !bytes.Equal(again.Patch, got.Patch) {
		t.Error("a dry run has another answer")
	}
	if got := r.review(t, webhook.InjectPath, podRequest(string(patched))); !got.Allowed || got.Patch != nil || got.PatchType != nil {
		t.Errorf("injected already: %+v", got)
	}
	if r.count(t, "inject", "injected") != 2 || r.count(t, "inject", "unchanged") != 1 {
		t.Error("reviews are not counted")
	}
}

func TestInjectRefusesWithTheReason(t *testing.T) {
	r := start(t, nil)
	pod := strings.Replace(smallPod, `"metadata":{`, `"metadata":{"annotations":{"sidecar.istio.io/proxyCPU":"a lot"},`, 1)
	got := r.review(t, webhook.InjectPath, podRequest(pod))
	want := `castellan: annotation sidecar.istio.io/proxyCPU: "a lot": want a positive quantity such as "100m" or "64Mi"`
	if got.Allowed || got.Result == nil || got.Result.Message != want || got.Result.Code != 422 || got.Patch != nil {
		t.Fatalf("%+v", got.Result)
	}
	if log := r.log.String(); !strings.Contains(log, "pod refused") || !strings.Contains(log, "a lot") {
		t.Errorf("the log says %s", log)
	}
}

func TestInjectLeavesTheRest(t *testing.T) {
	r := start(t, nil)
	for name, change := range map[string]func(*admissionv1.AdmissionRequest){
		"update":      func(q *admissionv1.AdmissionRequest) { q.Operation = admissionv1.Update },
		"subresource": func(q *admissionv1.AdmissionRequest) { q.SubResource = "ephemeralcontainers" },
		"no pod":      func(q *admissionv1.AdmissionRequest) { q.Kind.Kind = "Service" },
		"namespace":   func(q *admissionv1.AdmissionRequest) { q.Namespace = "kube-system" },
		"says no": func(q *admissionv1.AdmissionRequest) {
			q.Object.Raw = []byte(strings.Replace(smallPod, `"metadata":{`, `"metadata":{"labels":{"sidecar.istio.io/inject":"false"},`, 1))
		},
	} {
		req := podRequest(smallPod)
		change(req)
		if got := r.review(t, webhook.InjectPath, req); !got.Allowed || got.Patch != nil {
			t.Errorf("%s: %+v", name, got)
		}
	}
	req := podRequest(`{"spec":{"containers":"none"}}`)
	if got := r.review(t, webhook.InjectPath, req); got.Allowed || got.Result.Message != "the pod cannot be read" {
		t.Errorf("no pod: %+v", got)
	}
}

func TestWarningsAreFewAndShort(t *testing.T) {
	var annotations []string
	for i := range 40 {
		annotations = append(annotations, fmt.Sprintf(`"sidecar.istio.io/x%d%s":"1"`, i, strings.Repeat("y", 300)))
	}
	r := start(t, nil)
	pod := strings.Replace(smallPod, `"metadata":{`, `"metadata":{"annotations":{`+strings.Join(annotations, ",")+`},`, 1)
	got := r.review(t, webhook.InjectPath, podRequest(pod))
	if len(got.Warnings) != 11 || got.Warnings[10] != "and 30 more" {
		t.Errorf("%d warnings, the last %q", len(got.Warnings), got.Warnings[len(got.Warnings)-1])
	}
	for _, w := range got.Warnings {
		if len(w) > 256 {
			t.Errorf("%d bytes: %s", len(w), w)
		}
	}
}

func TestMalformedReviews(t *testing.T) {
	r := start(t, nil)
	review := func(s string) string { return `{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview"` + s + `}` }
	for name, row := range map[string]struct {
		contentType, body string
		code              int
		answer            string
	}{
		"form":         {"application/x-www-form-urlencoded", "a=b", 415, "want application/json"},
		"no type":      {"", "{}", 415, "want application/json"},
		"empty":        {"application/json", "", 400, "want an AdmissionReview of admission.k8s.io/v1"},
		"no JSON":      {"application/json", "<x>", 400, "want an AdmissionReview of admission.k8s.io/v1"},
		"other object": {"application/json", `{"apiVersion":"v1","kind":"Pod"}`, 400, "want an AdmissionReview of admission.k8s.io/v1"},
		"v1beta1":      {"application/json", `{"apiVersion":"admission.k8s.io/v1beta1","kind":"AdmissionReview","request":{"uid":"a"}}`, 400, "want an AdmissionReview of admission.k8s.io/v1"},
		"no request":   {"application/json", review(""), 400, "want a review with a request and its uid"},
		"no uid":       {"application/json; charset=utf-8", review(`,"request":{}`), 400, "want a review with a request and its uid"},
		"long uid":     {"application/json", review(`,"request":{"uid":"` + strings.Repeat("u", 200) + `"}`), 400, "want a review with a request and its uid"},
		"too large":    {"application/json", strings.Repeat(" ", 8<<20), 413, "review is too large"},
		"too many":     {"application/json", review(`,"request":{"uid":"a","x":[` + strings.Repeat("{},", 30_000) + `{}]}`), 413, "review has too many elements"},
	} {
		code, answer := r.post(t, webhook.InjectPath, row.contentType, strings.NewReader(row.body))
		if code != row.code || answer != row.answer+"\n" {
			t.Errorf("%s: %d %q", name, code, answer)
		}
	}
	// Of unknown length.
	if code, _ := r.post(t, webhook.InjectPath, "application/json", io.MultiReader(strings.NewReader(strings.Repeat(" ", 8<<20)))); code != 413 {
		t.Errorf("chunked: %d", code)
	}
	resp, err := r.client.Get(r.url + webhook.InjectPath)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if code, _ := r.post(t, "/other", "application/json", strings.NewReader("{}")); resp.StatusCode != 405 || code != 404 {
		t.Errorf("GET: %d, another path: %d", resp.StatusCode, code)
	}
	if r.count(t, "inject", "limited") != 3 || r.count(t, "inject", "malformed") != 9 {
		t.Errorf("limited %v, malformed %v", r.count(t, "inject", "limited"), r.count(t, "inject", "malformed"))
	}
}

// panicking fails as a bug of ours would.
type panicking struct{}

func (panicking) Labels(string) (map[string]string, bool) { panic("secret cause") }
func (panicking) Current() *workloads.File                { panic("secret cause") }

func TestPanicsDeny(t *testing.T) {
	r := start(t, func(c *webhook.Config) { c.Namespaces, c.Workloads = panicking{}, panicking{} })
	for path, req := range map[string]*admissionv1.AdmissionRequest{
		webhook.InjectPath: podRequest(smallPod), webhook.ValidatePath: policyRequest(t, "AuthorizationPolicy", "{rules: [{}]}"),
	} {
		got := r.review(t, path, req)
		if got.Allowed || strings.Contains(got.Result.Message, "secret") || got.Result.Code != 500 {
			t.Errorf("%s: %+v", path, got)
		}
	}
	if !strings.Contains(r.log.String(), "secret cause") || r.count(t, "inject", "failed") != 1 || r.count(t, "validate", "failed") != 1 {
		t.Error("the cause is not in the log")
	}
}

func TestCertificateIsReloaded(t *testing.T) {
	r := start(t, nil)
	serial := func() int64 {
		r.client.CloseIdleConnections()
		resp, err := r.client.Post(r.url+webhook.InjectPath, "application/json", strings.NewReader("{}"))
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.ProtoMajor != 2 || resp.TLS.Version != tls.VersionTLS13 {
			t.Errorf("%s, TLS %x", resp.Proto, resp.TLS.Version)
		}
		return resp.TLS.PeerCertificates[0].SerialNumber.Int64()
	}
	if got := serial(); got != 1 {
		t.Errorf("serial %d", got)
	}
	r.cert.Store(certificate(t, 2))
	if got := serial(); got != 2 {
		t.Errorf("serial %d after a change", got)
	}
	if err := r.Ready(); err != nil {
		t.Error(err)
	}
	r.cert.Store(nil)
	if err := r.Ready(); err == nil {
		t.Error("ready without a certificate")
	}
}

func TestOldTLSIsRefused(t *testing.T) {
	r := start(t, nil)
	_, err := tls.Dial("tcp", strings.TrimPrefix(r.url, "https://"), &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12})
	if err == nil {
		t.Error("TLS 1.2 is spoken")
	}
}

// waiting blocks reviews until it is let go.
type waiting struct{ entered, release chan struct{} }

func (w waiting) Labels(string) (map[string]string, bool) {
	w.entered <- struct{}{}
	<-w.release
	return nil, false
}

// A review under way is answered although the server ends.
func TestShutdownAnswersWhatIsUnderWay(t *testing.T) {
	w := waiting{make(chan struct{}, 1), make(chan struct{})}
	r := start(t, func(c *webhook.Config) { c.Namespaces = w })
	answered := make(chan *admissionv1.AdmissionResponse, 1)
	go func() { answered <- r.review(t, webhook.InjectPath, podRequest(smallPod)) }()
	<-w.entered
	ended := make(chan error, 1)
	go func() { ended <- r.stop() }()
	// Nobody new is let in once the end has begun.
	deadline := time.Now().Add(20 * time.Second)
	for {
		conn, err := net.Dial("tcp", strings.TrimPrefix(r.url, "https://"))
		if err != nil {
			break
		}
		conn.Close()
		if time.Now().After(deadline) {
			t.Fatal("the listener stays open")
		}
	}
	close(w.release)
	if got := <-answered; !got.Allowed || got.Patch == nil {
		t.Errorf("%+v", got)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// One address cannot take the whole room, and who finds none is told so in time.
func TestBudget(t *testing.T) {
	handler, take := webhook.HandlerWithBudget(newInjector(t, config.Inject{}))
	post := func(size int) int {
		req := httptest.NewRequest(http.MethodPost, webhook.InjectPath, strings.NewReader(strings.Repeat(" ", size)))
		req.Header.Set("Content-Type", "application/json")
		w := httptest.NewRecorder()
		handler.ServeHTTP(w, req)
		return w.Code
	}
	ctx := t.Context()
	mine := strings.Split(httptest.NewRequest(http.MethodPost, "/", nil).RemoteAddr, ":")[0]
	var release []func()
	hold := func(source string, n int64) {
		t.Helper()
		give, err := take(ctx, source, n)
		if err != nil {
			t.Fatal(err)
		}
		release = append(release, give)
	}
	hold(mine, 24<<20-100<<10)
	if code := post(1 << 20); code != http.StatusTooManyRequests {
		t.Errorf("beyond one address's share: %d", code)
	}
	if code := post(50 << 10); code != http.StatusBadRequest {
		t.Errorf("within it: %d", code)
	}
	hold("192.0.2.7", 24<<20)
	release[0]()
	hold("192.0.2.8", 24<<20)
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		if code := post(10); code != http.StatusServiceUnavailable || time.Since(began) != 5*time.Second {
			t.Errorf("no room at all: %d after %v", code, time.Since(began))
		}
	})
	release[1]()
	if code := post(7 << 20); code != http.StatusBadRequest {
		t.Errorf("room again: %d", code)
	}
}

func TestNewRefuses(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	cert := func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return nil, errors.New("none") }
	in := newInjector(t, config.Inject{})
	for want, cfg := range map[string]webhook.Config{
		"webhook: no listener":    {GetCertificate: cert, Injector: in},
		"webhook: no certificate": {Listener: l, Injector: in},
		"webhook: no injector":    {Listener: l, GetCertificate: cert},
	} {
		if _, err := webhook.New(cfg); err == nil || err.Error() != want {
			t.Errorf("%v, want %s", err, want)
		}
	}
	bad := webhook.Config{Listener: l, GetCertificate: cert, Injector: in}
	bad.Mesh.TrustDomain = "10.0.0.1"
	if _, err := webhook.New(bad); err == nil || !strings.HasPrefix(err.Error(), "webhook: mesh.trustDomain") {
		t.Errorf("%v", err)
	}
}

func TestNewInjectorRefuses(t *testing.T) {
	for want, cfg := range map[string]config.Inject{
		`webhook.inject.image: "-x": want an image's reference`:                                                             {Image: "-x"},
		`webhook.inject.limits.memory: want a positive quantity such as "100m" or "64Mi"`:                                   {Limits: config.ProxyResources{Memory: "much"}},
		`webhook.inject: cpu: the request 2 is more than the limit 1`:                                                       {Requests: config.ProxyResources{CPU: "2"}, Limits: config.ProxyResources{CPU: "1"}},
		`webhook.inject.revision: "default", want an RFC 1123 label other than "default"`:                                   {Revision: "default"},
		`webhook.inject.imagePullPolicy: "Sometimes", want Always, IfNotPresent or Never`:                                   {ImagePullPolicy: "Sometimes"},
		`webhook.inject.excludeNamespaces[0]: "A" is no name of a namespace`:                                                {ExcludeNamespaces: []string{"A"}},
		`webhook.inject.imagePullSecrets[0]: "" is no name of an object`:                                                    {ImagePullSecrets: []string{""}},
		`webhook.inject.logLevel: "loud", want debug, info, warn or error`:                                                  {LogLevel: "loud"},
		`webhook.inject.drainTimeout: must not be negative`:                                                                 {DrainTimeout: -1},
		`webhook.inject.capture.excludeInboundPorts[0]: "x" is no port: give a number, a range such as "9000-9010", or "*"`: {Capture: config.CaptureDefault{ExcludeInboundPorts: config.PortList{"x"}}},
	} {
		if _, err := webhook.NewInjector(cfg, "castellan-system"); err == nil || err.Error() != want {
			t.Errorf("%v\nwant %s", err, want)
		}
	}
	if _, err := webhook.NewInjector(config.Inject{}, ""); err == nil {
		t.Error("no namespace of our own")
	}
}
