package discovery_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"

	"castellan.dev/discovery"
)

func newADS(conn *grpc.ClientConn) discoveryv3.AggregatedDiscoveryServiceClient {
	return discoveryv3.NewAggregatedDiscoveryServiceClient(conn)
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestAtomicReplace(t *testing.T) {
	s := start(t, map[string]string{"a.yaml": allow("orders", "orders", "frontend")})
	one := s.follow(s.agent("one"))
	for _, who := range []string{"billing", "payments", "frontend"} {
		s.replace(s.path("a.yaml"), allow("orders", "orders", who))
		s.told(one, "pod-orders", "orders="+who)
	}
	if s.log.count("policy refused") > 0 {
		t.Error("something was refused on the way")
	}
}

// TestRename: a file that gets another name is never two.
func TestRename(t *testing.T) {
	s := start(t, map[string]string{"a.yaml": allow("orders", "orders", "frontend")})
	s.become("a.yaml shop/orders accepted 1")
	must(t, os.Rename(s.path("a.yaml"), s.path("b.yaml")))
	s.become("b.yaml shop/orders accepted 1")
	must(t, os.Rename(s.path("b.yaml"), s.path("b.yaml.disabled")))
	s.become("b.yaml.disabled / passed-over 0")
	must(t, os.Rename(s.path("b.yaml.disabled"), s.path("c.json")))
	s.become("c.json shop/orders accepted 1")
	if s.log.count("policy refused") > 0 {
		t.Error("something was refused on the way")
	}
}

// TestEditors: the old file is moved away before the new is written, and swap and
// lock files come and go.
func TestEditors(t *testing.T) {
	s := start(t, map[string]string{"a.yaml": allow("orders", "orders", "frontend")})
	one := s.follow(s.agent("one"))
	must(t, os.Symlink("user@host.1234", s.path(".#a.yaml")))
	must(t, os.WriteFile(s.path(".a.yaml"), []byte("{{{"), 0o644))
	must(t, os.Rename(s.path("a.yaml"), s.path("a.yaml~")))
	s.write("a.yaml", allow("orders", "orders", "billing"))
	must(t, os.Remove(s.path(".#a.yaml")))
	s.told(one, "pod-orders", "orders=billing")
	s.become("a.yaml shop/orders accepted 1")
	if s.log.count("policy refused") > 0 {
		t.Error("something was refused on the way")
	}
}

// TestHalfWritten: a file that is being written counts when it is whole, and what
// it held before stays until then.
func TestHalfWritten(t *testing.T) {
	s := start(t, map[string]string{"a.yaml": allow("orders", "orders", "frontend")})
	one := s.follow(s.agent("one"))
	s.told(one, "pod-orders", "orders=frontend")
	text := allow("orders", "orders", "billing")
	for _, name := range []string{"a.yaml", "new.yaml"} {
		f, err := os.Create(s.path(name)) // empty at first
		must(t, err)
		_, err = f.WriteString(text[:len(text)-10])
		must(t, err)
		s.write("other.yaml", allow("other-"+strings.TrimSuffix(name, ".yaml"), "orders", "x")) // the directory is read meanwhile
		_, err = f.WriteString(text[len(text)-10:])
		must(t, err)
		must(t, f.Close())
		text = allow("new", "orders", "billing")
	}
	s.told(one, "pod-orders", "new=billing orders=billing other-new=x")
	if s.log.count("policy refused") > 0 {
		t.Error("something was refused on the way")
	}
}

// TestConfigMap: a mounted ConfigMap is links to links to files, switched by one rename.
func TestConfigMap(t *testing.T) {
	s := prepare(t, nil)
	publish := func(version, who string) {
		must(t, os.Mkdir(s.path(version), 0o755))
		must(t, os.WriteFile(filepath.Join(s.path(version), "a.yaml"), []byte(allow("orders", "orders", who)), 0o644))
		must(t, os.Symlink(version, s.path("..data_tmp")))
		must(t, os.Rename(s.path("..data_tmp"), s.path("..data")))
	}
	publish("..v1", "frontend")
	must(t, os.Symlink("..data/a.yaml", s.path("a.yaml")))
	s.start()
	one := s.follow(s.agent("one"))
	s.told(one, "pod-orders", "orders=frontend")
	publish("..v2", "billing")
	s.told(one, "pod-orders", "orders=billing")
	s.become("a.yaml shop/orders accepted 1")
}

// TestDuplicates: neither of two of one name counts, the last good does.
func TestDuplicates(t *testing.T) {
	s := start(t, map[string]string{"a.yaml": allow("orders", "orders", "frontend")})
	one := s.follow(s.agent("one"))
	s.told(one, "pod-orders", "orders=frontend")
	s.write("b.yaml", allow("orders", "orders", "billing"))
	s.become("a.yaml shop/orders last-good 1 metadata.name", "b.yaml shop/orders last-good 1 metadata.name")
	s.told(one, "pod-orders", "orders=frontend")
	f := s.policies().GetPolicies()[0].GetFindings()[0]
	if want := "another AuthorizationPolicy of this name stands at " + s.path("b.yaml") + ":2; neither counts until one is removed or renamed"; f.GetReason() != want || f.GetValue() != "shop/orders" {
		t.Errorf("%q: %q, want %q", f.GetValue(), f.GetReason(), want)
	}
	must(t, os.Remove(s.path("a.yaml")))
	s.told(one, "pod-orders", "orders=billing")
	s.become("b.yaml shop/orders accepted 1")
	s.write("b.yaml", allow("orders", "orders", "billing")+"---"+allow("orders", "orders", "x"))
	s.become("b.yaml shop/orders last-good 1 metadata.name", "b.yaml shop/orders last-good 1 metadata.name")
	s.told(one, "pod-orders", "orders=billing")
}

// TestPartlyBroken: the parts of a file that can be read count, and those that it
// held before and cannot be told any more stay.
func TestPartlyBroken(t *testing.T) {
	s := start(t, map[string]string{"a.yaml": allow("orders", "orders", "frontend") + "---" + allow("payments", "payments", "frontend")})
	one, two := s.follow(s.agent("one")), s.follow(s.agent("two"))
	s.write("a.yaml", allow("orders", "orders", "billing")+"---\nkind: [")
	s.become("a.yaml shop/orders accepted 1", "a.yaml / last-good 0 line 10", "a.yaml shop/payments last-good 1 file")
	s.told(one, "pod-orders", "orders=billing")
	s.told(two, "pod-payments", "payments=frontend")
	// One more broken part than documents are missing: something new is in it.
	s.write("a.yaml", allow("orders", "orders", "billing")+"---\nkind: [\n---\nkind: [")
	s.told(two, "pod-payments", "deny")
}

func TestUnreadable(t *testing.T) {
	s := start(t, map[string]string{"a.yaml": allow("orders", "orders", "frontend")})
	one := s.follow(s.agent("one"))
	must(t, os.Remove(s.path("a.yaml")))
	must(t, syscall.Mkfifo(s.path("a.yaml"), 0o644)) // opening it must not hang
	s.become("a.yaml / last-good 0 file", "a.yaml shop/orders last-good 1 file")
	s.told(one, "pod-orders", "orders=frontend")
	must(t, os.Remove(s.path("a.yaml")))
	must(t, os.Symlink("nowhere", s.path("b.yaml")))
	s.become("b.yaml / refused 3 file")
	s.told(one, "pod-orders", "deny")
	must(t, os.Remove(s.path("b.yaml")))
	s.told(one, "pod-orders", "")
}

// TestDirectoryGone: a directory that cannot be read says nothing; all stays.
func TestDirectoryGone(t *testing.T) {
	s := start(t, map[string]string{"a.yaml": allow("orders", "orders", "frontend")})
	one := s.follow(s.agent("one"))
	must(t, os.Rename(s.dir, s.dir+".away"))
	s.become("a.yaml shop/orders accepted 1", "policy / last-good 0 directory")
	s.told(one, "pod-orders", "orders=frontend")
	must(t, os.Mkdir(s.dir, 0o755))
	s.write("a.yaml", allow("orders", "orders", "billing"))
	s.told(one, "pod-orders", "orders=billing")
	s.become("a.yaml shop/orders accepted 1")
}

func TestReadDocuments(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		must(t, os.MkdirAll(filepath.Dir(path), 0o755))
		must(t, os.WriteFile(path, []byte(text), 0o644))
		return path
	}
	write("a.yaml", "\xef\xbb\xbf# first\n"+allow("a", "x", "y")+"--- # second\r\n"+allow("b", "x", "y")+"...\n\n"+allow("c", "x", "y")+"---\n# nothing\n")
	write("b.json", `{"apiVersion":"security.istio.io/v1beta1","kind":"PeerAuthentication","metadata":{"namespace":"shop","name":"strict"},"spec":{"mtls":{"mode":"STRICT"}}}`)
	write("c.yml", "apiVersion: v1\nkind: List\nitems:\n- {apiVersion: security.istio.io/v1, kind: PeerAuthentication, metadata: {namespace: shop, name: one}}\n- {apiVersion: security.istio.io/v1, kind: PeerAuthentication, metadata: {namespace: shop, name: two}}\n")
	bad := write("d.yaml", "kind: X\n---\na: 1\na: 2\n---\n\n{\n")
	write("ignored.txt", "{")
	write(".hidden.yaml", "{")
	write("below/e.yaml", "{")
	docs, err := discovery.ReadDocuments(dir)
	must(t, err)
	var got []string
	for _, d := range docs {
		line := filepath.Base(d.Place()) + " " + d.Ref.String()
		for _, f := range d.Findings {
			line += " (" + f.String() + ")"
		}
		got = append(got, line)
	}
	want := []string{
		"a.yaml:3 AuthorizationPolicy shop/a", "a.yaml:12 AuthorizationPolicy shop/b", "a.yaml:22 AuthorizationPolicy shop/c",
		"b.json:1 PeerAuthentication shop/strict", "c.yml:1 PeerAuthentication shop/one", "c.yml:1 PeerAuthentication shop/two",
	}
	if len(got) != 9 || !slices.Equal(got[:6], want) {
		t.Fatalf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	for i, part := range []string{"d.yaml:1 X / (error: ", `d.yaml:3  / (error: line 3: not YAML: `, `d.yaml:7  / (error: line 7: not YAML: line `} {
		if !strings.HasPrefix(got[6+i], part) {
			t.Errorf("got %q, want %q...", got[6+i], part)
		}
	}
	one, err := discovery.ReadDocuments(bad)
	must(t, err)
	if len(one) != 3 || !one[0].Refused() {
		t.Errorf("got %v", one)
	}
	if _, err = discovery.ReadDocuments(filepath.Join(dir, "none")); err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("got %v", err)
	}
}
