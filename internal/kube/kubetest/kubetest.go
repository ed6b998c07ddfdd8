// Package kubetest has a small API server for tests of what is built on a
// Kubernetes client: over real HTTP, with resource versions, conflicts and watches,
// token reviews and token keys. It knows no schemas, no admission and no
// permissions; client-go's own fakes stop short of the transport, which is what
// some tests count and interrupt.
package kubetest

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/scheme"
)

// Request is one that was made.
type Request struct{ Method, Path string }

// Server is the API server.
type Server struct {
	// Issuer and JWKS are what it says of its tokens.
	Issuer string
	JWKS   []byte
	// Review answers token reviews, given and returned as the kind's JSON spec and status.
	Review func(token string, audiences []string) map[string]any

	t        testing.TB
	address  string
	mu       sync.Mutex
	http     *httptest.Server
	version  int
	objects  map[string]map[string]any // by path
	events   []event
	news     chan struct{} // closed at the next event, or at the end
	ended    bool
	requests []Request
}

type event struct {
	version int
	list    string // the path of the list it is of
	kind    string
	object  map[string]any
}

// New returns a server that is not started.
func New(t testing.TB) *Server {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &Server{t: t, address: l.Addr().String(), objects: map[string]map[string]any{}, news: make(chan struct{}), version: 1}
	l.Close()
	t.Cleanup(s.Stop)
	return s
}

// Start serves, always at the same address.
func (s *Server) Start() {
	s.t.Helper()
	l, err := net.Listen("tcp", s.address)
	if err != nil {
		s.t.Fatal(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ended = false
	s.http = &httptest.Server{Listener: l, Config: &http.Server{Handler: s, ReadHeaderTimeout: time.Minute}}
	s.http.Start()
}

// Stop ends it, watches included. What it holds stays.
func (s *Server) Stop() {
	s.mu.Lock()
	server := s.http
	s.http, s.ended = nil, true
	s.announce()
	s.mu.Unlock()
	if server != nil {
		server.CloseClientConnections()
		server.Close()
	}
}

// Kubeconfig writes a file that leads here.
func (s *Server) Kubeconfig() string {
	s.t.Helper()
	file := filepath.Join(s.t.TempDir(), "kubeconfig")
	text := fmt.Sprintf(`apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "http://%s"}}]
contexts: [{name: x, context: {cluster: c}}]
current-context: x
`, s.address)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		s.t.Fatal(err)
	}
	return file
}

// Requests returns those made since it was asked last.
func (s *Server) Requests() []Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.requests
	s.requests = nil
	return r
}

// Put makes or replaces the object at a path such as
// "/api/v1/namespaces/shop/pods/orders-1".
func (s *Server) Put(path string, object runtime.Object) {
	s.t.Helper()
	known, _, err := scheme.Scheme.ObjectKinds(object)
	if err != nil {
		s.t.Fatal(err)
	}
	object.GetObjectKind().SetGroupVersionKind(known[0])
	m, err := runtime.DefaultUnstructuredConverter.ToUnstructured(object)
	if err != nil {
		s.t.Fatal(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.store(path, m)
}

// Delete removes the object at a path.
func (s *Server) Delete(path string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if o, ok := s.objects[path]; ok {
		delete(s.objects, path)
		s.tell(path, "DELETED", o)
	}
}

// Get reads the object at a path into v; false if there is none.
func (s *Server) Get(path string, v any) bool {
	s.t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	o, ok := s.objects[path]
	if !ok {
		return false
	}
	data, err := json.Marshal(o)
	if err == nil {
		err = json.Unmarshal(data, v)
	}
	if err != nil {
		s.t.Fatal(err)
	}
	return true
}

func metadata(o map[string]any) map[string]any {
	m, ok := o["metadata"].(map[string]any)
	if !ok {
		m = map[string]any{}
		o["metadata"] = m
	}
	return m
}

// store is called with the lock held.
func (s *Server) store(path string, o map[string]any) {
	old, had := s.objects[path]
	m := metadata(o)
	s.version++
	m["resourceVersion"] = strconv.Itoa(s.version)
	if m["name"] == nil {
		m["name"] = filepath.Base(path)
	}
	if parts := strings.Split(path, "/"); slices.Contains(parts, "namespaces") && m["namespace"] == nil {
		m["namespace"] = parts[slices.Index(parts, "namespaces")+1]
	}
	kind := "ADDED"
	if had {
		kind = "MODIFIED"
		m["uid"] = metadata(old)["uid"]
	}
	if m["uid"] == nil {
		m["uid"] = "uid-" + strconv.Itoa(s.version)
	}
	s.objects[path] = o
	s.tell(path, kind, o)
}

func (s *Server) tell(path, kind string, o map[string]any) {
	if kind == "DELETED" {
		s.version++
	}
	s.events = append(s.events, event{version: s.version, list: filepath.Dir(path), kind: kind, object: o})
	s.announce()
}

func (s *Server) announce() {
	close(s.news)
	s.news = make(chan struct{})
}

// ServeHTTP implements http.Handler.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	s.requests = append(s.requests, Request{r.Method, r.URL.Path})
	s.mu.Unlock()
	switch {
	case r.URL.Path == "/.well-known/openid-configuration":
		answer(w, http.StatusOK, map[string]any{"issuer": s.Issuer, "jwks_uri": "https://elsewhere.test"})
	case r.URL.Path == "/openid/v1/jwks":
		w.Header().Set("Content-Type", "application/jwk-set+json")
		_, _ = w.Write(s.JWKS)
	case r.URL.Path == "/apis/authentication.k8s.io/v1/tokenreviews":
		s.review(w, r)
	case r.URL.Query().Get("watch") != "":
		s.watch(w, r)
	case r.Method == http.MethodGet:
		s.get(w, r.URL.Path)
	case r.Method == http.MethodPut, r.Method == http.MethodPost:
		s.write(w, r)
	default:
		refuse(w, http.StatusMethodNotAllowed, metav1.StatusReasonMethodNotAllowed)
	}
}

func answer(w http.ResponseWriter, code int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(v)
}

func refuse(w http.ResponseWriter, code int, reason metav1.StatusReason) {
	answer(w, code, map[string]any{"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "code": code, "message": string(reason)})
}

// kinds are lists by the last part of their path.
func kinds() map[string]string {
	return map[string]string{
		"pods": "Pod", "serviceaccounts": "ServiceAccount", "namespaces": "Namespace", "services": "Service", "endpointslices": "EndpointSlice",
		"configmaps": "ConfigMap", "nodes": "Node", "secrets": "Secret", "leases": "Lease",
		"mutatingwebhookconfigurations": "MutatingWebhookConfiguration", "validatingwebhookconfigurations": "ValidatingWebhookConfiguration",
	}
}

func (s *Server) get(w http.ResponseWriter, path string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if o, ok := s.objects[path]; ok {
		answer(w, http.StatusOK, o)
		return
	}
	kind, ok := kinds()[filepath.Base(path)]
	if !ok {
		refuse(w, http.StatusNotFound, metav1.StatusReasonNotFound)
		return
	}
	items := []any{}
	for p, o := range s.objects {
		if within(filepath.Dir(p), path) {
			items = append(items, o)
		}
	}
	answer(w, http.StatusOK, map[string]any{"kind": kind + "List", "apiVersion": apiVersion(path),
		"metadata": map[string]any{"resourceVersion": strconv.Itoa(s.version)}, "items": items})
}

// within reports whether a list's path is asked for: itself, or in all namespaces.
func within(list, asked string) bool {
	if list == asked {
		return true
	}
	prefix, rest, ok := strings.Cut(list, "/namespaces/")
	return ok && strings.Contains(rest, "/") && prefix+"/"+filepath.Base(list) == asked
}

func apiVersion(path string) string {
	parts := strings.Split(strings.TrimPrefix(path, "/"), "/")
	if parts[0] == "api" {
		return parts[1]
	}
	return parts[1] + "/" + parts[2]
}

// watch tells events since a version. A list by watching is refused, as an older API
// server does, and the client lists.
func (s *Server) watch(w http.ResponseWriter, r *http.Request) {
	if r.URL.Query().Get("sendInitialEvents") != "" {
		refuse(w, http.StatusUnprocessableEntity, metav1.StatusReasonInvalid)
		return
	}
	if _, ok := kinds()[filepath.Base(r.URL.Path)]; !ok {
		refuse(w, http.StatusNotFound, metav1.StatusReasonNotFound)
		return
	}
	since, _ := strconv.Atoi(r.URL.Query().Get("resourceVersion"))
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusOK)
	encoder := json.NewEncoder(w)
	for {
		s.mu.Lock()
		news, ended := s.news, s.ended
		for _, e := range s.events {
			if e.version > since && within(e.list, r.URL.Path) {
				_ = encoder.Encode(map[string]any{"type": e.kind, "object": e.object})
				since = e.version
			}
		}
		s.mu.Unlock()
		if ended {
			return
		}
		if f, ok := w.(http.Flusher); ok {
			f.Flush()
		}
		select {
		case <-news:
		case <-r.Context().Done():
			return
		}
	}
}

// decode reads a body, which the client may have sent as protobuf.
func decode(r *http.Request) (map[string]any, error) {
	body, err := io.ReadAll(io.LimitReader(r.Body, 4<<20))
	if err != nil {
		return nil, err
	}
	object, kind, err := scheme.Codecs.UniversalDeserializer().Decode(body, nil, nil)
	if err != nil {
		return nil, err
	}
	object.GetObjectKind().SetGroupVersionKind(*kind)
	return runtime.DefaultUnstructuredConverter.ToUnstructured(object)
}

func (s *Server) write(w http.ResponseWriter, r *http.Request) {
	o, err := decode(r)
	if err != nil {
		refuse(w, http.StatusBadRequest, metav1.StatusReasonBadRequest)
		return
	}
	path := r.URL.Path
	s.mu.Lock()
	defer s.mu.Unlock()
	if r.Method == http.MethodPost {
		name, _ := metadata(o)["name"].(string)
		path += "/" + name
		if _, ok := s.objects[path]; ok {
			refuse(w, http.StatusConflict, metav1.StatusReasonAlreadyExists)
			return
		}
		s.store(path, o)
		answer(w, http.StatusCreated, o)
		return
	}
	old, ok := s.objects[path]
	version, _ := metadata(o)["resourceVersion"].(string)
	switch {
	case !ok:
		refuse(w, http.StatusNotFound, metav1.StatusReasonNotFound)
	case version != "" && version != metadata(old)["resourceVersion"]:
		refuse(w, http.StatusConflict, metav1.StatusReasonConflict)
	default:
		s.store(path, o)
		answer(w, http.StatusOK, o)
	}
}

func (s *Server) review(w http.ResponseWriter, r *http.Request) {
	o, err := decode(r)
	if err != nil {
		refuse(w, http.StatusBadRequest, metav1.StatusReasonBadRequest)
		return
	}
	spec, _ := o["spec"].(map[string]any)
	token, _ := spec["token"].(string)
	var audiences []string
	list, _ := spec["audiences"].([]any)
	for _, a := range list {
		text, _ := a.(string)
		audiences = append(audiences, text)
	}
	o["status"] = s.Review(token, audiences)
	answer(w, http.StatusCreated, o)
}
