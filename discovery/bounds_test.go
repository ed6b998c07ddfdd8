package discovery_test

import (
	"fmt"
	"regexp"
	"strings"
	"testing"

	castellanv1 "castellan.dev/api/castellan/v1"
	"castellan.dev/authz"
	"castellan.dev/discovery"
)

// TestNamespaceBeyondTheClustersBound: one namespace alone does not reach the bound
// of all, and so does not stop the policies of others from being read.
func TestNamespaceBeyondTheClustersBound(t *testing.T) {
	api := &apiServer{changed: make(chan struct{}), file: cluster()}
	s := prepare(t, nil)
	source := discovery.NewObjects(discovery.ObjectsConfig{Source: api, Mesh: s.mesh})
	text := strings.Replace(allow("NAME", "nobody", "x"), "namespace: shop", "namespace: evil", 1)
	model := object(t, "u", 1, text)
	var objects []discovery.Object
	for i := range 20_001 {
		o, name := model, fmt.Sprint("p", i)
		o.Name, o.JSON = name, []byte(strings.Replace(string(model.JSON), "NAME", name, 1))
		objects = append(objects, o)
	}
	api.policies(append(objects, object(t, "u2", 1, allow("other", "orders", "x")))...)
	docs, _ := source.Documents()
	refused, found := 0, false
	for _, d := range docs {
		if d.Refused() {
			refused++
		}
		found = found || d.UID == "u2" && !d.Refused()
	}
	if !found || refused != 18_001 {
		t.Errorf("%d of %d refused; another namespace's is read: %t", refused, len(docs), found)
	}
}

// TestNamespacesBeyondTheClustersBound: nor do many namespaces together: those that
// have most give way, and what others have goes on to be read.
func TestNamespacesBeyondTheClustersBound(t *testing.T) {
	api := &apiServer{changed: make(chan struct{}), file: cluster()}
	s := prepare(t, nil)
	source := discovery.NewObjects(discovery.ObjectsConfig{Source: api, Mesh: s.mesh})
	model := object(t, "u", 1, strings.Replace(allow("NAME", "nobody", "x"), "namespace: shop", "namespace: SPACE", 1))
	var objects []discovery.Object
	several := func(namespace string, n int) {
		for i := range n {
			o, name := model, fmt.Sprint("p", i)
			o.Name, o.Namespace = name, namespace
			o.JSON = []byte(strings.NewReplacer("NAME", name, "SPACE", namespace).Replace(string(model.JSON)))
			objects = append(objects, o)
		}
	}
	for i := range 11 {
		several(fmt.Sprint("evil", i), 2001)
	}
	several("shop", 200)
	several("castellan-system", 1900)
	api.policies(objects...)
	docs, _ := source.Documents()
	refused := map[string]int{}
	for _, d := range docs {
		if d.Refused() {
			refused[d.Ref.Namespace]++
		}
	}
	// 19,800 are left to the eleven.
	if len(docs) != len(objects) || len(refused) != 11 || refused["evil0"] != 201 || refused["evil10"] != 201 {
		t.Errorf("%d of %d read, refused %v", len(docs), len(objects), refused)
	}
}

// TestTooMuchForAMessage: policies that would not fit into a message deny the
// workloads they select; those end no stream, and others of the node are told.
func TestTooMuchForAMessage(t *testing.T) {
	values := make([]string, 10_000)
	for i := range values {
		values[i] = fmt.Sprintf("%s-%d", strings.Repeat("x", 80), i)
	}
	api := &apiServer{changed: make(chan struct{}), file: cluster()}
	s := startObjects(t, api)
	var objects []discovery.Object
	for i := range 10 {
		o := object(t, fmt.Sprint("m", i), 1, strings.Replace(allow(fmt.Sprint("m", i), "orders", "PRINCIPAL"), "namespace: shop", "namespace: evil", 1))
		text := string(o.JSON)
		start := strings.LastIndex(text[:strings.Index(text, "PRINCIPAL")], `"`)
		end := start + 1 + strings.Index(text[start+1:], `"`) + 1
		o.JSON = []byte(text[:start] + `"` + strings.Join(values, `","`) + `"` + text[end:])
		objects = append(objects, o)
	}
	api.policies(append(objects, object(t, "u1", 1, allow("mine", "orders", "x")))...)
	two := s.follow(s.agent("two"))
	s.told(two, "pod-evil", "deny")
	var told castellanv1.WorkloadPolicy
	if _, ok := two.get("pod-evil", &told); !ok || !strings.Contains(told.GetDenyReason(), "8388608 are allowed") || len(told.GetDocuments()) != 0 {
		t.Errorf("told %q, %d documents", told.GetDenyReason(), len(told.GetDocuments()))
	}
	s.told(s.follow(s.agent("one")), "pod-orders", "mine=x")
	api.policies(objects[:1]...)
	s.told(two, "pod-evil", "m0")
}

// TestPolicyBeyondItsBounds: a policy with too much in it is refused where no
// webhook has done so, with few words, and its last good version stays.
func TestPolicyBeyondItsBounds(t *testing.T) {
	api := &apiServer{changed: make(chan struct{}), file: cluster()}
	s := startObjects(t, api)
	large := func(n int) discovery.Object {
		o := object(t, "u1", int64(n), strings.ReplaceAll(allow("large", "orders", "METHODS"), "principals", "namespaces"))
		values := make([]string, n)
		for i := range values {
			values[i] = fmt.Sprintf("%d!", i)
		}
		o.JSON = []byte(regexp.MustCompile(`\["[^"]*METHODS[^"]*"\]`).ReplaceAllString(string(o.JSON), `["`+strings.Join(values, `","`)+`"]`))
		return o
	}
	findings := func() []authz.Finding {
		all, _ := s.server.Statuses()
		if len(all) == 0 {
			return nil
		}
		return all[0].Findings
	}
	api.policies(large(10_000))
	s.reach("shop/large u1@10000 accepted 1/0/0")
	if got := findings(); len(got) != 101 || got[100].More != 9_900 {
		t.Errorf("%d findings", len(got))
	}
	api.policies(large(100_000))
	s.eventually("refusal", func() bool {
		got := findings()
		return len(got) == 1 && strings.Contains(got[0].Reason, "at most 10000 are allowed")
	})
	all, _ := s.server.Statuses()
	if !all[0].LastGoodInForce || all[0].Denies {
		t.Errorf("the last good version: %+v", all[0])
	}
}
