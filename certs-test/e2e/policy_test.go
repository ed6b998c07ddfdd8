package e2e_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"sigs.k8s.io/yaml"
)

const denyBench = `apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: extra, namespace: shop}
spec:
  selector: {matchLabels: {app: orders}}
  action: DENY
  rules: [{to: [{operation: {paths: ["/closed"]}}]}]
`

const brokenPolicy = `apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: extra, namespace: shop}
spec:
  selector: {matchLabels: {app: orders}}
  action: DENY
  rules: [{from: [{source: {ipBlocks: ["not-an-address"]}}]}]
`

// TestPolicyFiles: files added, changed and removed count; one that would not
// validate changes nothing, also across a restart of the server, and check says why.
func TestPolicyFiles(t *testing.T) {
	dir := shortDir(t)
	m := start(t, dir)
	up := m.path("up.json")
	m.wantStatus("shop/frontend", "orders", "GET", "/closed", 200)

	m.write("90-extra.yaml", denyBench)
	m.wantStatus("shop/frontend", "orders", "GET", "/closed", 403)
	m.wantStatus("shop/frontend", "orders", "GET", "/open", 200)
	eventually(t, "the change is reported as in force", func() error {
		if r := castellan(t, "check", "--up", up); r.code != 0 || !strings.Contains(r.out, "shop/extra: in force on 1 of 1") {
			return fmt.Errorf("%d %s", r.code, r.out)
		}
		return nil
	})

	m.write("90-extra.yaml", strings.ReplaceAll(denyBench, "/closed", "/other"))
	m.wantStatus("shop/frontend", "orders", "GET", "/closed", 200)
	m.wantStatus("shop/frontend", "orders", "GET", "/other", 403)

	m.write("90-extra.yaml", brokenPolicy)
	eventually(t, "check names file, field, value and reason", func() error {
		r := castellan(t, "check", "--up", up)
		for _, part := range []string{"90-extra.yaml", "spec.rules[0].from[0].source.ipBlocks[0]", `"not-an-address"`, "last good version"} {
			if r.code != 2 || !strings.Contains(r.out, part) {
				return fmt.Errorf("no %q, code %d: %s", part, r.code, r.out)
			}
		}
		return nil
	})
	m.wantStatus("shop/frontend", "orders", "GET", "/other", 403) // last good
	m.wantStatus("shop/frontend", "orders", "GET", "/open", 200)

	m.stop()
	m = start(t, dir)
	m.wantStatus("shop/frontend", "orders", "GET", "/other", 403) // last good across a restart
	m.wantStatus("shop/frontend", "orders", "GET", "/open", 200)

	if err := os.Remove(filepath.Join(m.file().PolicyDir, "90-extra.yaml")); err != nil {
		t.Fatal(err)
	}
	m.wantStatus("shop/frontend", "orders", "GET", "/other", 200)

	// One that was never good: the workloads it could select deny everything, others do not.
	m.write("91-new.yaml", strings.ReplaceAll(brokenPolicy, "name: extra", "name: never-good"))
	m.wantStatus("shop/frontend", "orders", "GET", "/open", 403)
	m.wantStatus("shop/orders", "frontend", "GET", "/", 200)
	castellan(t, "check", "--up", up).want(t, 2, "denies everything")
	if err := os.Remove(filepath.Join(m.file().PolicyDir, "91-new.yaml")); err != nil {
		t.Fatal(err)
	}
	m.wantStatus("shop/frontend", "orders", "GET", "/open", 200)

	m.write("92-text.yaml", "this is: [no policy\n")
	m.wantStatus("shop/orders", "frontend", "GET", "/", 403) // it could select anybody
	if err := os.Remove(filepath.Join(m.file().PolicyDir, "92-text.yaml")); err != nil {
		t.Fatal(err)
	}
	m.wantStatus("shop/orders", "frontend", "GET", "/", 200)
}

// TestPolicyFilesInPlace: editors that write in place are taken at their word, and
// what a writer that died leaves never opens anything.
func TestPolicyFilesInPlace(t *testing.T) {
	dir := shortDir(t)
	m := start(t, dir)
	up, path := m.path("up.json"), filepath.Join(m.file().PolicyDir, "90-extra.yaml")
	inPlace := func(text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	halfWritten := func() {
		t.Helper()
		eventually(t, "check tells of the half-written file", func() error {
			r := castellan(t, "check", "--up", up)
			for _, part := range []string{"90-extra.yaml", "looks half-written", "last good version"} {
				if r.code != 2 || !strings.Contains(r.out, part) {
					return fmt.Errorf("no %q, code %d: %s", part, r.code, r.out)
				}
			}
			return nil
		})
		m.wantStatus("shop/frontend", "orders", "GET", "/closed", 403)
		m.wantStatus("shop/frontend", "orders", "GET", "/other", 200)
	}
	inPlace(strings.ReplaceAll(denyBench, `["/closed"]`, `["/closed", "/other"]`))
	m.wantStatus("shop/frontend", "orders", "GET", "/other", 403)
	inPlace(denyBench) // shorter
	m.wantStatus("shop/frontend", "orders", "GET", "/other", 200)
	m.wantStatus("shop/frontend", "orders", "GET", "/closed", 403)

	for _, text := range []string{"", denyBench[:strings.Index(denyBench, "  rules:")], "# nothing\n"} {
		inPlace(text)
		halfWritten()
	}
	m.stop()
	m = start(t, dir)
	halfWritten() // across a restart

	inPlace(strings.ReplaceAll(denyBench, "/closed", "/other"))
	m.wantStatus("shop/frontend", "orders", "GET", "/other", 403)
	m.wantStatus("shop/frontend", "orders", "GET", "/closed", 200)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	m.wantStatus("shop/frontend", "orders", "GET", "/other", 200)
	castellan(t, "check", "--up", up).want(t, 0, "")
}

// TestModes: STRICT refuses plaintext and PERMISSIVE takes it; who has no
// identity does not pass a policy that names one.
func TestModes(t *testing.T) {
	m := start(t, shortDir(t))
	inbound := "http://" + m.file().Workloads["shop/frontend"].Inbound + "/"
	if resp, err := plainClient.Get(inbound); err == nil {
		resp.Body.Close()
		t.Fatalf("STRICT answered plaintext with %s", resp.Status)
	}
	m.write("10-strict.yaml", strings.ReplaceAll(strictPolicy, "STRICT", "PERMISSIVE"))
	eventually(t, "PERMISSIVE takes plaintext", func() error {
		resp, err := plainClient.Get(inbound)
		if err != nil {
			return err
		}
		resp.Body.Close()
		if resp.StatusCode != 200 {
			return fmt.Errorf("%s", resp.Status)
		}
		return nil
	})
	m.wantStatus("shop/orders", "frontend", "GET", "/", 200) // mutual TLS goes on working
	resp, err := plainClient.Get("http://" + m.file().Workloads["shop/orders"].Inbound + "/")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != 403 {
		t.Errorf("orders in the clear: %s, want 403", resp.Status)
	}
	m.write("10-strict.yaml", strictPolicy)
	eventually(t, "STRICT refuses plaintext again", func() error {
		resp, err := plainClient.Get(inbound)
		if err != nil {
			return nil
		}
		resp.Body.Close()
		return fmt.Errorf("%s", resp.Status)
	})
}

const strictPolicy = `apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: castellan-system}
spec: {mtls: {mode: STRICT}}
`

// TestSecureNaming: a service whose endpoint runs as another account is refused
// by the client, whatever its certificate; both identities are in the log only.
func TestSecureNaming(t *testing.T) {
	m := start(t, shortDir(t))
	path := m.path("workloads.yaml")
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	f := m.file()
	port := func(addr string) string { return addr[strings.LastIndexByte(addr, ':')+1:] }
	// orders' declared endpoint now is where payments listens.
	changed := strings.ReplaceAll(string(data), port(f.Workloads["shop/orders"].Inbound), port(f.Workloads["shop/payments"].Inbound))
	if err := os.WriteFile(path+".tmp", []byte(changed), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".tmp", path); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the connection fails", func() error {
		code, body, err := m.ask("shop/frontend", "orders", "GET", "/")
		if err != nil || code == 200 || code == 403 {
			return fmt.Errorf("%d %w", code, err)
		}
		if strings.Contains(body, "spiffe") || strings.Contains(body, "payments") {
			t.Errorf("the body tells too much: %q", body)
		}
		return nil
	})
	eventually(t, "both identities are in the log", func() error {
		log, err := os.ReadFile(m.path("logs", "shop.frontend.proxy.log"))
		if err != nil {
			return err
		}
		for line := range strings.SplitSeq(string(log), "\n") {
			if strings.Contains(line, "sa/payments") && strings.Contains(line, "sa/orders") {
				return nil
			}
		}
		return fmt.Errorf("not found")
	})
}

// TestPodGone: removing a pod's entry is deleting the pod: its token gets nothing
// any more, and what it has goes on until it expires.
func TestPodGone(t *testing.T) {
	m := start(t, shortDir(t), "--svid-ttl", "10s")
	m.editWorkloads(func(list []any) []any {
		return slices.DeleteFunc(list, func(w any) bool { return w.(map[string]any)["serviceAccount"] == "intruder" })
	})
	socket := m.file().Workloads["guest/intruder"].Socket
	deadline := time.Now().Add(2 * patience)
	for {
		r := castellan(t, "cert", "inspect", "unix:"+socket)
		if r.code != 0 {
			if !strings.Contains(r.err, "PermissionDenied") && !strings.Contains(r.err, "Unavailable") {
				t.Errorf("%s", r.err)
			}
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the pod is gone and its certificate is still renewed")
		}
		time.Sleep(200 * time.Millisecond)
	}
	m.wantStatus("shop/frontend", "orders", "GET", "/", 200)
}

// editWorkloads replaces the declared pods in one step.
func (m *mesh) editWorkloads(edit func([]any) []any) {
	m.t.Helper()
	data, err := os.ReadFile(m.path("workloads.yaml"))
	if err != nil {
		m.t.Fatal(err)
	}
	var file map[string]any
	if err := yaml.Unmarshal(data, &file); err != nil {
		m.t.Fatal(err)
	}
	file["workloads"] = edit(file["workloads"].([]any))
	if data, err = yaml.Marshal(file); err != nil {
		m.t.Fatal(err)
	}
	if err := os.WriteFile(m.path("w.tmp"), data, 0o600); err != nil {
		m.t.Fatal(err)
	}
	if err := os.Rename(m.path("w.tmp"), m.path("workloads.yaml")); err != nil {
		m.t.Fatal(err)
	}
}
