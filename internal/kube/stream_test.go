package kube_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"k8s.io/client-go/rest"

	"castellan.dev/internal/kube"
)

// streamingServer is an API server that lists by streaming, and by nothing else.
type streamingServer struct {
	*httptest.Server
	objects map[string][]string // by path, JSON
	// cut ends every watch when it is closed.
	cut    chan struct{}
	lists  atomic.Int32
	opened atomic.Int32
}

func (s *streamingServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	if r.URL.Path == "/apis/security.istio.io/v1" {
		fmt.Fprint(w, `{"kind":"APIResourceList","apiVersion":"v1","groupVersion":"security.istio.io/v1","resources":[`+
			`{"name":"authorizationpolicies"},{"name":"peerauthentications"},{"name":"requestauthentications"}]}`)
		return
	}
	objects, known := s.objects[r.URL.Path]
	if !known {
		http.NotFound(w, r)
		return
	}
	if r.URL.Query().Get("watch") == "" {
		s.lists.Add(1)
		http.Error(w, "lists are not served", http.StatusInternalServerError)
		return
	}
	s.opened.Add(1)
	kind := strings.TrimSuffix(r.URL.Path[strings.LastIndexByte(r.URL.Path, '/')+1:], "s")
	if r.URL.Query().Get("sendInitialEvents") == "true" {
		for _, o := range objects {
			fmt.Fprintf(w, `{"type":"ADDED","object":%s}`+"\n", o)
		}
		apiVersion := "v1"
		for path, version := range map[string]string{"discovery": "discovery.k8s.io/v1", "security": "security.istio.io/v1"} {
			if strings.Contains(r.URL.Path, path) {
				apiVersion = version
			}
		}
		kinds := map[string]string{"pod": "Pod", "serviceaccount": "ServiceAccount", "namespace": "Namespace", "service": "Service", "endpointslice": "EndpointSlice",
			"authorizationpolicie": "AuthorizationPolicy", "peerauthentication": "PeerAuthentication", "requestauthentication": "RequestAuthentication"}
		fmt.Fprintf(w, `{"type":"BOOKMARK","object":{"kind":%q,"apiVersion":%q,"metadata":{"resourceVersion":"50","annotations":{"k8s.io/initial-events-end":"true"}}}}`+"\n", kinds[kind], apiVersion)
	}
	w.(http.Flusher).Flush()
	select {
	case <-r.Context().Done():
	case <-s.cut:
	}
}

// TestStreaming: against an API server that streams its lists, as they do, all
// is known without one large answer, and a watch that breaks is opened again.
func TestStreaming(t *testing.T) {
	policyJSON, err := json.Marshal(authorization("one"))
	if err != nil {
		t.Fatal(err)
	}
	podJSON, err := json.Marshal(fullPod())
	if err != nil {
		t.Fatal(err)
	}
	s := &streamingServer{cut: make(chan struct{}), objects: map[string][]string{
		"/api/v1/pods":            {strings.Replace(string(podJSON), "{", `{"kind":"Pod","apiVersion":"v1",`, 1)},
		"/api/v1/serviceaccounts": {}, "/api/v1/namespaces": {}, "/api/v1/services": {}, "/apis/discovery.k8s.io/v1/endpointslices": {},
		"/apis/security.istio.io/v1/authorizationpolicies":  {string(policyJSON)},
		"/apis/security.istio.io/v1/peerauthentications":    {},
		"/apis/security.istio.io/v1/requestauthentications": {},
	}}
	s.Server = httptest.NewServer(s)
	t.Cleanup(s.Close)
	client, err := kube.New(&rest.Config{Host: s.URL}, "castellan-system")
	if err != nil {
		t.Fatal(err)
	}
	i, err := kube.NewInformers(kube.InformersConfig{Kubernetes: client.Kubernetes(), Dynamic: client.Dynamic()})
	if err != nil {
		t.Fatal(err)
	}
	background(t, i.Run)
	eventually(t, "sync", func() bool { return i.Synced() && i.Policies().Ready() == nil })
	if objects, _ := i.Policies().Objects(); len(objects) != 1 || len(i.Pods().ListKeys()) != 1 {
		t.Errorf("policies %v, pods %v", objects, i.Pods().ListKeys())
	}
	if n := s.lists.Load(); n != 0 {
		t.Errorf("%d lists in one answer", n)
	}
	contact, opened := i.LastContact(), s.opened.Load()
	close(s.cut)
	eventually(t, "another watch of each, and contact", func() bool { return s.opened.Load() >= 2*opened && i.LastContact().After(contact) })
	if time.Since(i.LastContact()) > patience {
		t.Errorf("last contact %v", i.LastContact())
	}
}
