package discovery_test

import (
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	castellanv1 "castellan.dev/api/castellan/v1"
	"castellan.dev/discovery"
)

// deny is an AuthorizationPolicy of shop that keeps two paths of app closed.
func deny(name, app string) string {
	return `
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {namespace: shop, name: ` + name + `}
spec:
  selector: {matchLabels: {app: ` + app + `}}
  rules:
  - from: [{source: {principals: ["cluster.local/ns/shop/sa/frontend"]}}]
    to:
    - operation:
        methods: [GET]
        ports: ["8080"]
`
}

// stays checks for a while that a pod is told the same.
func (s *setup) stays(f *follower, pod, want string, d time.Duration) {
	s.t.Helper()
	for deadline := time.Now().Add(d); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if got := f.policy(pod); got != want {
			s.t.Fatalf("%s is told %q, want %q; %q", pod, got, want, s.describe())
		}
	}
}

// held waits for the finding about a file, and returns its reason.
func (s *setup) held(name string) string {
	s.t.Helper()
	var reason string
	s.eventually("finding about "+name, func() bool {
		for _, p := range s.policies().GetPolicies() {
			if p.GetFile() == s.path(name) && p.GetName() == "" && p.GetLastGoodInForce() && len(p.GetFindings()) == 1 {
				f := p.GetFindings()[0]
				reason = f.GetReason()
				return f.GetSeverity() == "error" && f.GetField() == "file"
			}
		}
		return false
	})
	return reason
}

// within reports how long it took until a pod was told something.
func (s *setup) within(f *follower, pod, want string, most time.Duration) {
	s.t.Helper()
	began := time.Now()
	s.told(f, pod, want)
	if took := time.Since(began); took > most {
		s.t.Errorf("it took %v until %s was told %q, %v are allowed", took, pod, want, most)
	}
}

// TestEmptied: emptying a file removes nothing, however long it lasts, across
// restarts too; removing it does.
func TestEmptied(t *testing.T) {
	for name, text := range map[string]string{"empty": "", "blank": "\n\n", "comments": "# nothing\n---\n# here\n"} {
		t.Run(name, func(t *testing.T) {
			s := start(t, map[string]string{"a.yaml": allow("orders", "orders", "frontend")})
			s.eventually("kept text", func() bool { return len(s.keptTexts()) == 1 })
			one := s.follow(s.agent("one"))
			s.write("a.yaml", text)
			if got := s.held("a.yaml"); !strings.Contains(got, "it holds no document any more") || !strings.Contains(got, "remove the file") {
				t.Errorf("the reason is %q", got)
			}
			s.stays(one, "pod-orders", "orders=frontend", 700*time.Millisecond)
			if got := s.kept(); len(got) != 1 {
				t.Errorf("%q are kept", got)
			}
			s.stop()
			s.start()
			s.become("a.yaml shop/orders accepted 1", "a.yaml / last-good 0 file")
			one = s.follow(s.agent("one"))
			s.told(one, "pod-orders", "orders=frontend")
			// What then begins to come still has its last good version.
			s.write("a.yaml", allow("orders", "orders", "billing")[:120])
			s.stays(one, "pod-orders", "orders=frontend", 700*time.Millisecond)
			s.write("a.yaml", allow("orders", "orders", "billing"))
			s.within(one, "pod-orders", "orders=billing", time.Second)
			s.become("a.yaml shop/orders accepted 1")
			s.write("a.yaml", text)
			s.held("a.yaml")
			must(t, os.Remove(s.path("a.yaml")))
			s.within(one, "pod-orders", "", time.Second)
			s.become()
		})
	}
}

func (s *setup) keptTexts() []string {
	entries, err := os.ReadDir(s.good + "/files")
	if err != nil {
		return nil
	}
	var out []string
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out
}

// TestEmptiedBeforeTextsWereKept: by a release that kept documents alone.
func TestEmptiedBeforeTextsWereKept(t *testing.T) {
	s := start(t, map[string]string{"a.yaml": allow("orders", "orders", "frontend")})
	s.eventually("last good", func() bool { return len(s.kept()) == 1 })
	s.stop()
	must(t, os.RemoveAll(s.good+"/files"))
	s.write("a.yaml", "")
	s.start()
	s.become("a.yaml shop/orders accepted 1", "a.yaml / last-good 0 file")
}

// TestCutWithin: the beginning of a document can be a wider policy; it never
// counts, nor does it take away the documents that stood behind it.
func TestCutWithin(t *testing.T) {
	whole := deny("orders", "orders") + "---" + allow("more", "orders", "billing")
	cut := whole[:strings.Index(whole, "    to:")]
	s := start(t, map[string]string{"a.yaml": whole})
	one := s.follow(s.agent("one"))
	s.told(one, "pod-orders", "more=billing orders=frontend")
	s.eventually("kept text", func() bool { return len(s.keptTexts()) == 1 })
	before, _ := one.get("pod-orders", &castellanv1.WorkloadPolicy{})
	unchanged := func(d time.Duration) {
		t.Helper()
		for deadline := time.Now().Add(d); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
			if got, _ := one.get("pod-orders", &castellanv1.WorkloadPolicy{}); got != before {
				t.Fatalf("another policy is in force; %q", s.describe())
			}
		}
	}
	s.write("a.yaml", cut)
	if got := s.held("a.yaml"); !strings.Contains(got, "ends within a document") || !strings.Contains(got, "replace the file by rename") {
		t.Errorf("the reason is %q", got)
	}
	unchanged(3 * time.Second)
	// Cut elsewhere, and again across a restart.
	s.write("a.yaml", whole[:len(whole)-40])
	unchanged(700 * time.Millisecond)
	s.write("a.yaml", cut)
	s.stop()
	s.start()
	s.become("a.yaml shop/orders accepted 1", "a.yaml shop/more accepted 1", "a.yaml / last-good 0 file")
	one = s.follow(s.agent("one"))
	unchanged(700 * time.Millisecond)
	// The same by rename is meant.
	s.replace(s.path("a.yaml"), cut)
	s.within(one, "pod-orders", "orders=frontend", time.Second)
	if got, _ := one.get("pod-orders", &castellanv1.WorkloadPolicy{}); got == before {
		t.Error("the replacement does not count")
	}
	s.become("a.yaml shop/orders accepted 1")
}

// TestCutOfAList: kubectl's lists are one YAML document of several policies.
func TestCutOfAList(t *testing.T) {
	item := func(name string) string {
		return "- apiVersion: security.istio.io/v1\n  kind: AuthorizationPolicy\n  metadata: {namespace: shop, name: " + name + "}\n  spec: {selector: {matchLabels: {app: orders}}, action: DENY, rules: [{}]}\n"
	}
	head := "apiVersion: v1\nkind: List\nitems:\n"
	s := start(t, map[string]string{"a.yaml": head + item("one") + item("two")})
	f := s.follow(s.agent("one"))
	for _, text := range []string{head + item("one"), head} {
		s.write("a.yaml", text)
		s.held("a.yaml")
		s.stays(f, "pod-orders", "one two", 2500*time.Millisecond)
	}
}

// TestCutBetween: a file that ends with a document may be meant so. It counts once
// nobody has gone on writing for two seconds, and is reported until then.
func TestCutBetween(t *testing.T) {
	first := allow("orders", "orders", "frontend") + "---\n"
	s := start(t, map[string]string{"a.yaml": first + allow("more", "orders", "billing")})
	one := s.follow(s.agent("one"))
	s.told(one, "pod-orders", "more=billing orders=frontend")
	s.write("a.yaml", first)
	s.held("a.yaml")
	s.stays(one, "pod-orders", "more=billing orders=frontend", time.Second)
	s.told(one, "pod-orders", "orders=frontend")
	s.become("a.yaml shop/orders accepted 1")
}

// TestOpenForWriting: what a process is writing does not count until it is done,
// however long that takes, and however whole it looks.
func TestOpenForWriting(t *testing.T) {
	s := start(t, map[string]string{"a.yaml": allow("orders", "orders", "frontend")})
	one := s.follow(s.agent("one"))
	f, err := os.OpenFile(s.path("a.yaml"), os.O_WRONLY|os.O_TRUNC, 0)
	must(t, err)
	defer f.Close()
	_, err = f.WriteString(allow("orders", "orders", "billing"))
	must(t, err)
	added, err := os.Create(s.path("b.yaml"))
	must(t, err)
	defer added.Close()
	_, err = added.WriteString(allow("more", "orders", "billing"))
	must(t, err)
	if got := s.held("a.yaml"); !strings.Contains(got, "open for writing") {
		t.Errorf("the reason is %q", got)
	}
	s.held("b.yaml")
	s.stays(one, "pod-orders", "orders=frontend", 2500*time.Millisecond)
	must(t, f.Close())
	s.within(one, "pod-orders", "orders=billing", time.Second)
	must(t, added.Close())
	s.within(one, "pod-orders", "more=billing orders=billing", time.Second)
	s.become("a.yaml shop/orders accepted 1", "b.yaml shop/more accepted 1")
}

// TestWritingIsNotHeldUp: asking who writes does not get in the way of who does.
func TestWritingIsNotHeldUp(t *testing.T) {
	s := start(t, map[string]string{"a.yaml": allow("orders", "orders", "frontend")})
	for range 2000 {
		began := time.Now()
		s.write("a.yaml", allow("orders", "orders", "billing"))
		if took := time.Since(began); took > 2*time.Second {
			t.Fatalf("a write took %v", took)
		}
	}
}

// TestEditedInPlace: whoever writes a file in place and closes it, and leaves
// anything but the beginning of what it held, is taken at their word at once.
func TestEditedInPlace(t *testing.T) {
	a, b, c := allow("a", "orders", "frontend"), allow("b", "orders", "frontend"), allow("c", "orders", "frontend")
	s := start(t, map[string]string{"x.yaml": a + "---" + b + "---" + c})
	one := s.follow(s.agent("one"))
	for _, step := range []struct{ text, want string }{
		{a + "---" + c, "a=frontend c=frontend"},           // one taken out
		{allow("a", "orders", "billing"), "a=billing"},     // shorter, and other
		{"# still a\n" + allow("a", "orders", "b"), "a=b"}, // longer
		{b, "b=frontend"},                                  // another
		{b + "# the end\n", "b=frontend"},                  // comments come
		{b, "b=frontend"},                                  // and go
		{"# c\n" + c + "---" + a, "a=frontend c=frontend"}, //
		{"# a\n" + strings.ReplaceAll(deny("a", "orders"), "frontend", "x"), "a=x"},    //
		{strings.ReplaceAll(deny("a", "orders"), "frontend", "x")[:200] + "\n", "a=x"}, // lines taken out
	} {
		s.write("x.yaml", step.text)
		s.within(one, "pod-orders", step.want, time.Second)
	}
	s.become("x.yaml shop/a accepted 1")
	// The editor's way: truncated, and written after some milliseconds.
	f, err := os.Create(s.path("x.yaml"))
	must(t, err)
	_, err = f.WriteString(b[:50])
	must(t, err)
	_, err = f.WriteString(b[50:])
	must(t, err)
	must(t, f.Close())
	s.within(one, "pod-orders", "b=frontend", time.Second)
	if s.log.count("policy refused") > 0 {
		t.Error("something was refused on the way")
	}
}

// TestPassedOver: what lies in the directory and does not count is told of.
func TestPassedOver(t *testing.T) {
	s := start(t, map[string]string{"deny.YAML": deny("a", "orders"), "a.yaml~": "x", "#a.yaml#": "x", ".a.yaml.swp": "x"})
	s.become("deny.YAML / passed-over 0")
	f := s.policies().GetPolicies()[0].GetFindings()[0]
	if f.GetSeverity() != "warning" || f.GetField() != "file" || !strings.Contains(f.GetReason(), "*.yaml") {
		t.Errorf("got %v", f)
	}
	must(t, os.Mkdir(s.path("team"), 0o755))
	s.write("deny.yaml.txt", "x")
	s.become("deny.YAML / passed-over 0", "deny.yaml.txt / passed-over 0", "team / passed-over 0")
	if got := s.denied(); len(got) > 0 {
		t.Errorf("%q deny everything", got)
	}
	must(t, os.Remove(s.path("deny.YAML")))
	s.become("deny.yaml.txt / passed-over 0", "team / passed-over 0")
}

// TestForeign: an object of another API is told of, and denies nobody.
func TestForeign(t *testing.T) {
	s := start(t, map[string]string{"a.yaml": allow("orders", "orders", "frontend")})
	one := s.follow(s.agent("one"))
	s.write("b.yaml", "apiVersion: v1\nkind: ConfigMap\nmetadata: {namespace: shop, name: x}\ndata: {a: b}\n")
	s.become("a.yaml shop/orders accepted 1", "b.yaml shop/x refused 0 apiVersion")
	f := s.policies().GetPolicies()[1].GetFindings()[0]
	if f.GetValue() != "v1" || !strings.Contains(f.GetReason(), "selects no workload") {
		t.Errorf("got %v", f)
	}
	if got := s.denied(); len(got) > 0 {
		t.Errorf("%q deny everything", got)
	}
	s.told(one, "pod-orders", "orders=frontend")
}

// TestFindings: each names a place, and the value where it is small.
func TestFindings(t *testing.T) {
	for name, c := range map[string]struct {
		text, field, value string
		ref                discovery.Ref
	}{
		"no YAML":               {"a: b: c", "line 1", "", discovery.Ref{}},
		"no object":             {"just words", "document", "just words", discovery.Ref{}},
		"an unknown field":      {broken("x", "payments"), "spec.rules[0].from[0].source.prinzipals", `["cluster.local/ns/shop/sa/x"]`, discovery.Ref{Kind: "AuthorizationPolicy", Namespace: "shop", Name: "x"}},
		"an unknown text":       {strings.Replace(allow("x", "payments", "y"), "spec:", "spec:\n  acton: DENY", 1), "spec.acton", "DENY", discovery.Ref{Kind: "AuthorizationPolicy", Namespace: "shop", Name: "x"}},
		"an unknown large one":  {strings.Replace(allow("x", "payments", "y"), "spec:", "spec:\n  acton: ["+strings.Repeat("long, ", 100)+"]", 1), "spec.acton", "", discovery.Ref{Kind: "AuthorizationPolicy", Namespace: "shop", Name: "x"}},
		"an unknown odd name":   {strings.Replace(allow("x", "payments", "y"), "spec:", "spec:\n  \"a.b\": DENY", 1), `spec["a.b"]`, "", discovery.Ref{Kind: "AuthorizationPolicy", Namespace: "shop", Name: "x"}},
		"a field that is asked": {"apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n", "metadata", "", discovery.Ref{Kind: "AuthorizationPolicy"}},
	} {
		t.Run(name, func(t *testing.T) {
			path := t.TempDir() + "/x.yaml"
			must(t, os.WriteFile(path, []byte(c.text), 0o600))
			docs, err := discovery.ReadDocuments(path)
			must(t, err)
			if len(docs) != 1 || len(docs[0].Findings) != 1 {
				t.Fatalf("got %+v", docs)
			}
			if f := docs[0].Findings[0]; f.Field != c.field || f.Value != c.value || docs[0].Ref != c.ref {
				t.Errorf("got %q: %q of %v, want %q: %q of %v", f.Field, f.Value, docs[0].Ref, c.field, c.value, c.ref)
			}
		})
	}
}

// TestWarningsKnowThePorts: an HTTP field is warned of where it can meet a TCP port.
func TestWarningsKnowThePorts(t *testing.T) {
	text := strings.Replace(strings.Replace(deny("x", "orders"), "  rules:", "  action: DENY\n  rules:", 1), "        ports: [\"8080\"]\n", "", 1)
	warned := func(s *setup) func() bool {
		return func() bool {
			return slices.ContainsFunc(s.policies().GetPolicies()[0].GetFindings(), func(f *castellanv1.PolicyFinding) bool {
				return f.GetSeverity() == "warning" && strings.Contains(f.GetReason(), "on a TCP port")
			})
		}
	}
	s := start(t, map[string]string{"a.yaml": text})
	if warned(s)() {
		t.Errorf("warned of a workload that has HTTP ports alone: %v", s.policies().GetPolicies()[0])
	}
	s.replace(s.workloads, strings.ReplaceAll(inventory, "{number: 8080, protocol: http}", "{number: 8080, protocol: tcp}"))
	s.eventually("warning about a TCP port", warned(s))
	s.replace(s.workloads, inventory)
	s.eventually("no warning", func() bool { return !warned(s)() })
	s.write("a.yaml", strings.ReplaceAll(text, "app: orders", "app: nobody"))
	s.eventually("warning where nothing is known", warned(s))
}
