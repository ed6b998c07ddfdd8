package e2e_test

import (
	"encoding/pem"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// damage changes one file; the server must not start on it.
func damage(t *testing.T, path string, change func([]byte) []byte) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, change(data), 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestServerStartsOnNoDamagedKey: half-written, readable by others, or parted
// from its certificate; what was there stays as it was, so that a backup helps.
func TestServerStartsOnNoDamagedKey(t *testing.T) {
	s := newSite(t, "").start()
	s.mustIssue(s.client())
	s.server.signal(syscall.SIGTERM)
	if code := s.server.wait(t); code != 0 {
		t.Fatalf("exit code %d", code)
	}
	keys, err := filepath.Glob(filepath.Join(s.data, "ca", "*.pem"))
	if err != nil || len(keys) < 3 {
		t.Fatalf("key files %v %v", keys, err)
	}
	root := filepath.Join(s.data, "ca", "root.pem")
	only := func(kind string) func([]byte) []byte {
		return func(data []byte) (out []byte) {
			for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
				if strings.HasSuffix(block.Type, kind) {
					out = append(out, pem.EncodeToMemory(block)...)
				}
			}
			return out
		}
	}
	for _, path := range keys {
		name := filepath.Base(path)
		original, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range []struct {
			name, want string
			change     func([]byte) []byte
		}{
			{"half-written key", "half-written", func(b []byte) []byte { return b[:100] }},
			{"half-written certificate", "half-written", func(b []byte) []byte { return b[:len(b)-100] }},
			{"certificate without its key", "half-written", only("CERTIFICATE")},
			{"key without its certificate", "half-written", only("PRIVATE KEY")},
			{"empty", "is empty", func([]byte) []byte { return nil }},
		} {
			t.Run(name+" "+c.name, func(t *testing.T) {
				damage(t, path, c.change)
				launch(t, "castellan-server", s.path("server.yaml")).refusesToStart(t, path, c.want)
				after, err := os.ReadFile(path)
				if err != nil || string(after) != string(c.change(original)) {
					t.Errorf("the file was touched (%v)", err)
				}
			})
			damage(t, path, func([]byte) []byte { return original })
		}
		t.Run(name+" group-readable", func(t *testing.T) {
			if err := os.Chmod(path, 0o640); err != nil {
				t.Fatal(err)
			}
			launch(t, "castellan-server", s.path("server.yaml")).refusesToStart(t, path, "may be read by others (mode 0640)", "chmod 600")
		})
		if err := os.Chmod(path, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	t.Run("root gone", func(t *testing.T) {
		if err := os.Rename(root, root+".away"); err != nil {
			t.Fatal(err)
		}
		launch(t, "castellan-server", s.path("server.yaml")).refusesToStart(t, root, "restore the root from a backup")
	})
	if err := os.Rename(root+".away", root); err != nil {
		t.Fatal(err)
	}
	// Put right again, everything goes on.
	bundle := s.roots()
	s.start()
	if !s.roots().Equal(bundle) {
		t.Error("another root")
	}
	s.mustIssue(s.client())
}

// TestBadStarts: what is wrong with a configuration or its surroundings is one
// line that names the field or file, from each of the real binaries.
func TestBadStarts(t *testing.T) {
	s := newSite(t, "")
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	live, err := net.Listen("unix", s.path("live.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer live.Close()
	s.write("a-file", "x")
	s.write("token", s.token(podAgent))

	server := s.config("")
	agent := fmt.Sprintf(`apiVersion: castellan.dev/v1alpha1
kind: AgentConfig
trustDomain: cluster.local
node: node-a
tokenFile: %[1]s/token
server: {address: %[2]q, bundleFile: %[1]s/bundle.pem}
admin: %[3]q
workloads:
- {namespace: shop, serviceAccount: orders, socket: %[1]s/orders.sock, uids: [%[4]d], tokenFile: %[1]s/token}
`, s.dir, s.grpc, ownPort(t), os.Getuid())
	proxy := fmt.Sprintf("apiVersion: castellan.dev/v1alpha1\nkind: ProxyConfig\nagentSocket: %s/orders.sock\nadmin: %q\ninbound:\n- {listen: %q, app: \"127.0.0.1:1\"}\n",
		s.dir, ownPort(t), ownPort(t))
	swap := func(text, from, to string) string {
		if !strings.Contains(text, from) {
			t.Fatalf("%q is not in\n%s", from, text)
		}
		return strings.Replace(text, from, to, 1)
	}
	for _, c := range []struct {
		name, binary, config string
		want                 []string
	}{
		{"unknown field", "castellan-server", server + "polcy: x\n", []string{`unknown field "polcy"`}},
		{"unknown field", "castellan-agent", agent + "polcy: x\n", []string{`unknown field "polcy"`}},
		{"unknown field", "castellan-proxy", proxy + "polcy: x\n", []string{`unknown field "polcy"`}},
		{"wrong kind", "castellan-server", agent, []string{`unknown field`}},
		{"wrong kind", "castellan-agent", swap(agent, "AgentConfig", "ServerConfig"), []string{`kind: "ServerConfig", want "AgentConfig"`}},
		{"wrong kind", "castellan-proxy", swap(proxy, "ProxyConfig", "AgentConfig"), []string{`kind: "AgentConfig", want "ProxyConfig"`}},
		{"port in use", "castellan-server", swap(server, s.grpc, taken.Addr().String()), []string{"listen: ", taken.Addr().String(), "in use by another process"}},
		{"admin port in use", "castellan-server", swap(server, s.http, taken.Addr().String()), []string{"http: ", taken.Addr().String(), "in use by another process"}},
		{"port in use", "castellan-agent", agent[:strings.Index(agent, "admin:")] + fmt.Sprintf("admin: %q\n", taken.Addr()) + agent[strings.Index(agent, "workloads:"):], []string{"admin: ", taken.Addr().String(), "in use"}},
		{"port in use", "castellan-proxy", proxy + fmt.Sprintf("- {listen: %q, app: \"127.0.0.1:1\"}\n", taken.Addr()), []string{"inbound", taken.Addr().String(), "in use"}},
		{"socket in use", "castellan-agent", swap(agent, s.path("orders.sock"), s.path("live.sock")), []string{"shop/orders", s.path("live.sock"), "in use"}},
		{"socket in use", "castellan-server", server + "adminSocket: " + s.path("live.sock") + "\n", []string{"adminSocket: ", s.path("live.sock"), "in use by another process"}},
		{"a file where the socket goes", "castellan-agent", swap(agent, s.path("orders.sock"), s.path("a-file")), []string{s.path("a-file"), "socket"}},
		{"data directory below a file", "castellan-server", swap(server, s.data, s.path("a-file")+"/data"), []string{s.path("a-file"), "not a directory"}},
		{"keys of the issuer missing", "castellan-server", swap(server, "keys.json", "nokeys.json"), []string{s.path("nokeys.json"), "no such file"}},
		{"workloads file missing", "castellan-server", swap(server, "workloads.yaml", "nowhere.yaml"), []string{s.path("nowhere.yaml"), "no such file"}},
		{"policy directory missing", "castellan-server", swap(server, "/policy}", "/nowhere}"), []string{"policyDir", s.path("nowhere")}},
		{"lifetimes without room", "castellan-server", server + "ca: {leafTTL: 24h, intermediateTTL: 25h}\n", []string{"ca.intermediateTTL: 25h"}},
		{"trust domain like an address", "castellan-server", server + "mesh: {trustDomain: 10.0.0.1}\n", []string{"mesh.trustDomain", "IP address"}},
	} {
		t.Run(c.binary+" "+c.name, func(t *testing.T) {
			path := writeTo(t, filepath.Join(t.TempDir(), "config.yaml"), c.config)
			launch(t, c.binary, path).refusesToStart(t, c.want...)
		})
	}
	t.Run("no bundle yet", func(t *testing.T) {
		// The agent waits for the bundle file, says so, and needs no restart.
		s.start()
		bundle, err := os.ReadFile(s.path("bundle.pem"))
		if err != nil {
			t.Fatal(err)
		}
		config := writeTo(t, s.path("agent.yaml"), swap(agent, "bundle.pem", "late.pem"))
		p := launch(t, "castellan-agent", config)
		eventually(t, "the missing bundle is in the log", func() error {
			if !p.alive() {
				t.Fatalf("it ended: %s", p.err)
			}
			if !strings.Contains(p.err.String(), s.path("late.pem")) {
				return fmt.Errorf("not there: %s", p.err)
			}
			return nil
		})
		s.write("late.pem", string(bundle))
		eventually(t, "the agent has its certificate", func() error {
			if len(logged(p.err.String(), map[string]string{"msg": "certificate issued", "id": "sa/castellan-agent"})) == 0 {
				return fmt.Errorf("not yet")
			}
			return nil
		})
	})
}

// TestStaleSocketsAreReplaced: a killed process leaves its sockets; the next one
// takes their place.
func TestStaleSocketsAreReplaced(t *testing.T) {
	s := newSite(t, "").start()
	s.server.signal(syscall.SIGKILL)
	s.server.wait(t)
	if _, err := os.Stat(filepath.Join(s.data, "admin.sock")); err != nil {
		t.Fatalf("the killed server left no socket: %v", err)
	}
	s.start()
	castellan(t, "ca", "status", "--up", s.path("up.json")).want(t, 0, "svid-issuer")

	s.write("token", s.token(podAgent))
	s.write("orders-token", s.token(podOrders))
	config := s.write("agent.yaml", fmt.Sprintf(`apiVersion: castellan.dev/v1alpha1
kind: AgentConfig
trustDomain: cluster.local
node: node-a
tokenFile: %[1]s/token
server: {address: %[2]q, bundleFile: %[1]s/bundle.pem}
admin: %[3]q
workloads:
- {namespace: shop, serviceAccount: orders, socket: %[1]s/orders.sock, uids: [%[4]d], tokenFile: %[1]s/orders-token}
`, s.dir, s.grpc, ownPort(t), os.Getuid()))
	socket := "unix:" + s.path("orders.sock")
	first := launch(t, "castellan-agent", config)
	serves := func() error {
		if r := castellan(t, "cert", "inspect", socket); r.code != 0 || !strings.Contains(r.out, ordersID.String()) {
			return fmt.Errorf("%d %s", r.code, r.err)
		}
		return nil
	}
	eventually(t, "the socket serves", serves)
	// While it lives, nobody takes its socket.
	second := writeTo(t, s.path("second.yaml"), strings.Replace(readText(t, config), "admin: ", "admin: 127.0.0.1:0 # ", 1))
	launch(t, "castellan-agent", second).refusesToStart(t, s.path("orders.sock"), "in use")
	if err := serves(); err != nil {
		t.Errorf("the refused start disturbed the one that runs: %v", err)
	}
	first.signal(syscall.SIGKILL)
	first.wait(t)
	if _, err := os.Stat(s.path("orders.sock")); err != nil {
		t.Fatalf("the killed agent left no socket: %v", err)
	}
	launch(t, "castellan-agent", config)
	eventually(t, "the next agent serves on the same path", serves)
}

func readText(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// TestPluggedInChain: a chain that openssl made, in the file names of Istio's
// cacerts; without name constraints only when that is allowed by name.
func TestPluggedInChain(t *testing.T) {
	make := func(t *testing.T, extension string) string {
		t.Helper()
		dir := t.TempDir()
		writeTo(t, filepath.Join(dir, "ca.ext"), "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign,cRLSign\nsubjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n"+extension)
		for _, args := range []string{
			"req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-384 -nodes -days 3650 -keyout root-key.pem -out root-cert.pem -subj /O=Example/CN=Root -addext keyUsage=critical,keyCertSign,cRLSign",
			"req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout ca-key.pem -out ca.csr -subj /O=Example/CN=Mesh",
			"x509 -req -in ca.csr -CA root-cert.pem -CAkey root-key.pem -CAcreateserial -days 365 -extfile ca.ext -out ca-cert.pem",
		} {
			cmd := exec.Command("openssl", strings.Fields(args)...)
			cmd.Dir = dir
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("openssl %s: %v\n%s", args, err, out)
			}
		}
		writeTo(t, filepath.Join(dir, "cert-chain.pem"), readText(t, filepath.Join(dir, "ca-cert.pem")))
		return dir
	}
	const constraints = "nameConstraints=critical,permitted;DNS:localhost,permitted;IP:127.0.0.1/255.255.255.255\n"
	t.Run("unconstrained", func(t *testing.T) {
		dir := make(t, "")
		s := newSite(t, "ca: {chainDir: "+dir+"}")
		s.launch().refusesToStart(t, filepath.Join(dir, "ca-cert.pem"), "no name constraints", "ca.allowUnconstrainedIssuer")

		s.write("server.yaml", s.config("ca: {chainDir: "+dir+", allowUnconstrainedIssuer: true}"))
		s.start()
		s.checkPlugged(t, dir)
		if len(logged(s.server.err.String(), map[string]string{"level": "WARN", "msg": "constraint"})) == 0 {
			t.Errorf("it warned of nothing:\n%s", s.server.err)
		}
	})
	t.Run("constrained", func(t *testing.T) {
		dir := make(t, constraints)
		s := newSite(t, "servingNames: [localhost, 127.0.0.1]\nca: {chainDir: "+dir+"}").start()
		s.checkPlugged(t, dir)
	})
	t.Run("damaged", func(t *testing.T) {
		dir := make(t, constraints)
		s := newSite(t, "ca: {chainDir: "+dir+"}")
		key := filepath.Join(dir, "ca-key.pem")
		if err := os.Chmod(key, 0o644); err != nil {
			t.Fatal(err)
		}
		s.launch().refusesToStart(t, key, "may be read by others")
		if err := os.Chmod(key, 0o600); err != nil {
			t.Fatal(err)
		}
		foreign := make(t, constraints)
		damage(t, key, func([]byte) []byte { return []byte(readText(t, filepath.Join(foreign, "ca-key.pem"))) })
		s.launch().refusesToStart(t, key, "does not belong to the certificate")
		if err := os.Remove(key); err != nil {
			t.Fatal(err)
		}
		s.launch().refusesToStart(t, key, "no such file")
	})
}

// checkPlugged: what is issued verifies against the plugged-in root with openssl.
func (s *site) checkPlugged(t *testing.T, dir string) {
	t.Helper()
	_, chain := s.mustIssue(s.client())
	leaf := writeTo(t, filepath.Join(dir, "leaf.pem"), chain[0])
	above := writeTo(t, filepath.Join(dir, "above.pem"), strings.Join(chain[1:len(chain)-1], ""))
	out, err := exec.Command("openssl", "verify", "-purpose", "sslclient", "-CAfile", filepath.Join(dir, "root-cert.pem"), "-untrusted", above, leaf).CombinedOutput()
	if err != nil {
		t.Errorf("openssl verify: %v\n%s", err, out)
	}
	if strings.TrimSpace(readText(t, s.path("bundle.pem"))) != strings.TrimSpace(readText(t, filepath.Join(dir, "root-cert.pem"))) {
		t.Error("the bundle is not the plugged-in root")
	}
	// The server's own name is vouched for under the same root.
	castellan(t, "cert", "inspect", s.grpc).want(t, 0, "localhost")
}
