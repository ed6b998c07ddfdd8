package up_test

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"castellan.dev/api/policy"
	"castellan.dev/discovery"
	"castellan.dev/internal/config"
	"castellan.dev/internal/up"
	"castellan.dev/internal/workloads"
)

// binaries is a directory in which the siblings stand, as empty files.
func binaries(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for _, name := range []string{"castellan-server", "castellan-agent", "castellan-proxy"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// dataDir is short enough for sockets below it.
func dataDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "up")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "d")
}

func TestRunRefuses(t *testing.T) {
	good := up.Config{DataDir: dataDir(t), TrustDomain: "cluster.local", BinDir: binaries(t), Self: self(t), Log: discard()}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	open := dataDir(t)
	if err := os.Mkdir(open, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(open, 0o777); err != nil {
		t.Fatal(err)
	}
	link := dataDir(t)
	if err := os.Symlink(t.TempDir(), link); err != nil {
		t.Fatal(err)
	}
	long := "/tmp/" + strings.Repeat("d", 100)
	empty := t.TempDir()
	tests := map[string]struct {
		change func(*up.Config)
		want   string
	}{
		"trust domain":       {func(c *up.Config) { c.TrustDomain = "10.0.0.1" }, `--trust-domain: identity: trust domain "10.0.0.1" looks like an IP address; choose a name such as "cluster.local"`},
		"no trust domain":    {func(c *up.Config) { c.TrustDomain = "" }, `--trust-domain: identity: trust domain "": trust domain is missing`},
		"lifetime too short": {func(c *up.Config) { c.SVIDTTL = time.Second }, "--svid-ttl: 1s is outside 5s to 24h0m0s"},
		"lifetime too long":  {func(c *up.Config) { c.SVIDTTL = 25 * time.Hour }, "--svid-ttl: 25h0m0s is outside 5s to 24h0m0s"},
		"policy directory":   {func(c *up.Config) { c.PolicyDir = file }, "--policy-dir: " + file + " is not a directory"},
		"no policies":        {func(c *up.Config) { c.PolicyDir = "/nothing" }, "--policy-dir: /nothing is not a directory"},
		"binaries":           {func(c *up.Config) { c.BinDir = empty }, "up: castellan-server is not beside castellan in " + empty + "; run `make build`"},
		"long socket path":   {func(c *up.Config) { c.DataDir = long }, `--data-dir: the socket "` + long + `/server/admin.sock" has `},
		"a file":             {func(c *up.Config) { c.DataDir = file }, "up: "},
		"others may write":   {func(c *up.Config) { c.DataDir = open }, "up: others may write to " + open},
		"a link":             {func(c *up.Config) { c.DataDir = link }, "a link is not followed"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			cfg := good
			tt.change(&cfg)
			ctx, cancel := context.WithCancel(context.Background())
			cancel() // should it start, it ends at once
			err := up.Run(ctx, cfg)
			if name == "a file" {
				if err == nil || !strings.Contains(err.Error(), "not a directory") {
					t.Errorf("%v", err)
				}
				return
			}
			isInput(t, err, tt.want)
		})
	}
	t.Run("two on one directory", func(t *testing.T) {
		dir := dataDir(t)
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		f, err := os.Create(filepath.Join(dir, "lock"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			t.Fatal(err)
		}
		cfg := good
		cfg.DataDir = dir
		err = up.Run(context.Background(), cfg)
		if want := "up: " + dir + " is in use by another `castellan up`; stop that one or choose another --data-dir"; err == nil || err.Error() != want {
			t.Errorf("%v, want %s", err, want)
		}
	})
}

func TestPrepare(t *testing.T) {
	dir := dataDir(t)
	cfg := up.Config{DataDir: dir, TrustDomain: "cluster.local", BinDir: binaries(t), Self: self(t), Log: discard(), SVIDTTL: 10 * time.Second}
	file, err := up.Prepare(cfg)
	if err != nil {
		t.Fatal(err)
	}
	path := func(elem ...string) string { return filepath.Join(append([]string{dir}, elem...)...) }
	read := func(t *testing.T, p string) string {
		t.Helper()
		data, err := os.ReadFile(p)
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}

	t.Run("configurations are valid and agree", func(t *testing.T) {
		var server config.Server
		if err := config.Load(path("config", "server.yaml"), &server); err != nil {
			t.Fatal(err)
		}
		if server.Listen != file.Server.GRPC || server.HTTP != file.Server.HTTP || server.AdminSocket != file.Server.Admin || server.BundleFile != file.Bundle || time.Duration(server.CA.LeafTTL) != 10*time.Second || server.Discovery.PolicyDir != file.PolicyDir {
			t.Errorf("%+v", server)
		}
		var agent config.Agent
		if err := config.Load(path("config", "agent.yaml"), &agent); err != nil {
			t.Fatal(err)
		}
		if agent.Cluster != "Kubernetes" || agent.Server.Address != file.Server.GRPC || agent.Admin != file.Agent.Admin || agent.TokenFile != file.Agent.Token || len(agent.Workloads) != 4 {
			t.Errorf("%+v", agent)
		}
		for _, w := range agent.Workloads {
			key := w.Namespace + "/" + w.ServiceAccount
			if f := file.Workloads[key]; f.Socket != w.Socket || f.Token != w.TokenFile || !slices.Equal(w.UIDs, []uint32{uint32(os.Getuid())}) {
				t.Errorf("%s: %+v, %+v", key, w, f)
			}
			var proxy config.Proxy
			if err := config.Load(path("config", "proxy."+w.Namespace+"."+w.ServiceAccount+".yaml"), &proxy); err != nil {
				t.Fatal(err)
			}
			f := file.Workloads[key]
			if proxy.AgentSocket != f.Socket || proxy.Inbound[0].Listen != f.Inbound || proxy.Inbound[0].App != f.App || proxy.Admin != f.Admin || len(proxy.Outbound) != 3 {
				t.Errorf("%s: %+v", key, proxy)
			}
			for _, out := range proxy.Outbound {
				_, service, _ := strings.Cut(out.Service, "/")
				if f.Outbound[service] != "http://"+out.Listen {
					t.Errorf("%s to %s: %s, up.json says %s", key, out.Service, out.Listen, f.Outbound[service])
				}
			}
		}
	})
	t.Run("workloads and services", func(t *testing.T) {
		declared, err := workloads.Parse([]byte(read(t, path("workloads.yaml"))))
		if err != nil {
			t.Fatal(err)
		}
		if len(declared.Workloads) != 4 || len(declared.Services) != 3 {
			t.Fatalf("%+v", declared)
		}
		for _, w := range declared.Workloads {
			if w.Labels["app"] != w.ServiceAccount || w.PodUID == "" || w.Node == "" {
				t.Errorf("%+v", w)
			}
		}
	})
	t.Run("sample policies are admitted, with this mesh's own keys", func(t *testing.T) {
		docs, err := discovery.ReadDocuments(file.PolicyDir)
		if err != nil || len(docs) < 5 {
			t.Fatalf("%d documents, %v", len(docs), err)
		}
		for _, d := range discovery.Admit(docs, policy.Mesh{TrustDomain: "cluster.local", RootNamespace: "castellan-system"}) {
			if d.Refused() {
				t.Errorf("%s: %v", d.Place(), d.Findings)
			}
			if r := d.Document.RequestAuthentication; r != nil && (r.JWTRules[0].Jwks != read(t, file.JWT.JWKS) || r.JWTRules[0].Issuer != file.JWT.Issuer) {
				t.Errorf("%+v", r.JWTRules)
			}
		}
	})
	t.Run("secrets are this user's alone", func(t *testing.T) {
		err := filepath.WalkDir(dir, func(p string, d os.DirEntry, err error) error {
			if err != nil || !strings.Contains(p, "/tokens") && !strings.HasSuffix(p, ".key") && !strings.HasSuffix(p, "/issuer") {
				return err
			}
			info, err := d.Info()
			if err == nil && info.Mode().Perm()&0o077 != 0 {
				t.Errorf("%s is %v", p, info.Mode())
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
	})
	t.Run("the next start keeps everything", func(t *testing.T) {
		mine := "# mine\n"
		if err := os.WriteFile(filepath.Join(file.PolicyDir, "30-orders.yaml"), []byte(mine), 0o600); err != nil {
			t.Fatal(err)
		}
		declared := read(t, path("workloads.yaml")) + "# mine\n"
		if err := os.WriteFile(path("workloads.yaml"), []byte(declared), 0o600); err != nil {
			t.Fatal(err)
		}
		keys := read(t, file.JWT.JWKS)
		again, err := up.Prepare(cfg)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(file, again); diff != "" {
			t.Error(diff)
		}
		if read(t, filepath.Join(file.PolicyDir, "30-orders.yaml")) != mine || read(t, path("workloads.yaml")) != declared || read(t, file.JWT.JWKS) != keys {
			t.Error("something was written again")
		}
	})
	t.Run("what the last run said is gone", func(t *testing.T) {
		if err := file.Write(path("up.json")); err != nil {
			t.Fatal(err)
		}
		if _, err := up.Prepare(cfg); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(path("up.json")); err == nil {
			t.Error("up.json leads to a mesh that has ended")
		}
	})
	t.Run("samples cut short are copied again", func(t *testing.T) {
		if err := os.RemoveAll(file.PolicyDir); err != nil {
			t.Fatal(err)
		}
		if err := os.MkdirAll(file.PolicyDir+".new", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file.PolicyDir+".new/half.yaml", []byte("half"), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := up.Prepare(cfg); err != nil {
			t.Fatal(err)
		}
		entries, err := os.ReadDir(file.PolicyDir)
		if err != nil || len(entries) != 4 {
			t.Errorf("%v, %v", entries, err)
		}
	})
	t.Run("new ports and UIDs: the old workloads file is put aside", func(t *testing.T) {
		old := read(t, path("workloads.yaml"))
		if err := os.Remove(path("state.json")); err != nil {
			t.Fatal(err)
		}
		if _, err := up.Prepare(cfg); err != nil {
			t.Fatal(err)
		}
		var state struct{ UIDs map[string]string }
		if err := json.Unmarshal([]byte(read(t, path("state.json"))), &state); err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(read(t, path("workloads.yaml")), state.UIDs["pod/shop/orders"]) || read(t, path("workloads.yaml.old")) != old {
			t.Error("tokens name pods that the workloads file does not")
		}
	})
	t.Run("policies of the user's own", func(t *testing.T) {
		own := cfg
		own.DataDir, own.PolicyDir = dataDir(t), t.TempDir()
		file, err := up.Prepare(own)
		if err != nil || file.PolicyDir != own.PolicyDir {
			t.Fatalf("%+v, %v", file, err)
		}
		if entries, err := os.ReadDir(own.PolicyDir); err != nil || len(entries) > 0 {
			t.Errorf("samples were copied into it: %v, %v", entries, err)
		}
		if _, err := os.Stat(filepath.Join(own.DataDir, "policy")); err == nil {
			t.Error("a directory of samples was made")
		}
	})
}

func sample() up.File {
	f := up.File{
		TrustDomain: "cluster.local", Bundle: "/d/bundle.pem", PolicyDir: "/d/policy",
		Server:    up.Server{GRPC: "127.0.0.1:1", HTTP: "127.0.0.1:2", Admin: "/d/server/admin.sock", PID: 3},
		Agent:     up.Agent{Admin: "127.0.0.1:4", PID: 5, Token: "/d/tokens/agent"},
		Workloads: map[string]up.Workload{},
		JWT:       up.JWT{Issuer: "https://users", JWKS: "/d/jwks", ValidToken: "/d/tokens/user-valid", NoGroupToken: "/d/n", ExpiredToken: "/d/e"},
	}
	for i, name := range []string{"shop/frontend", "shop/orders", "shop/payments", "guest/intruder"} {
		f.Workloads[name] = up.Workload{
			Socket: "/d/s", Token: "/d/t", Inbound: "127.0.0.1:10", App: "127.0.0.1:11", Admin: "127.0.0.1:12", PID: 100 + i,
			Outbound: map[string]string{"orders": "http://127.0.0.1:20", "payments": "http://127.0.0.1:21", "frontend": "http://127.0.0.1:22"},
		}
	}
	return f
}

// Programs rely on these keys.
func TestFileKeys(t *testing.T) {
	path := filepath.Join(t.TempDir(), "up.json")
	if err := sample().Write(path); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var got map[string]any
	if err := json.Unmarshal(data, &got); err != nil {
		t.Fatal(err)
	}
	keys := func(v any) []string {
		m, _ := v.(map[string]any)
		var out []string
		for k := range m {
			out = append(out, k)
		}
		slices.Sort(out)
		return out
	}
	workload := got["workloads"].(map[string]any)["shop/orders"]
	for name, tt := range map[string]struct {
		value any
		want  string
	}{
		"top":      {got, "agent bundle jwt policyDir server trustDomain workloads"},
		"server":   {got["server"], "admin grpc http pid"},
		"agent":    {got["agent"], "admin pid token"},
		"workload": {workload, "admin app inbound outbound pid socket token"},
		"outbound": {workload.(map[string]any)["outbound"], "frontend orders payments"},
		"jwt":      {got["jwt"], "expiredToken issuer jwks noGroupToken validToken"},
	} {
		if k := strings.Join(keys(tt.value), " "); k != tt.want {
			t.Errorf("%s has %s, want %s", name, k, tt.want)
		}
	}
	back, err := up.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(sample(), *back); diff != "" {
		t.Error(diff)
	}
}

func TestReadFile(t *testing.T) {
	dir := t.TempDir()
	if _, err := up.ReadFile(dir + "/up.json"); err == nil || err.Error() != "no mesh is running by "+dir+"/up.json; start one with `castellan up`, or name its file with --up" {
		t.Errorf("%v", err)
	}
	if err := os.WriteFile(dir+"/up.json", []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := up.ReadFile(dir + "/up.json"); err == nil || err.Error() != dir+"/up.json: unexpected end of JSON input" {
		t.Errorf("%v", err)
	}
	if up.Dir("/d/up.json") != "/d" || up.WorkloadsFile("/d/up.json") != "/d/workloads.yaml" {
		t.Error("paths")
	}
}

func TestDescribe(t *testing.T) {
	t.Chdir(t.TempDir())
	here, err := filepath.Abs(".castellan/up.json")
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := sample().Describe(&out, "build/castellan", here); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"TRUST DOMAIN    cluster.local\n", "SERVER          grpc 127.0.0.1:1", "http http://127.0.0.1:2", "pid 3\n", "AGENT           admin http://127.0.0.1:4",
		"shop/frontend   inbound 127.0.0.1:10 (mTLS)", "shop/orders ", "shop/payments ", "guest/intruder ", "pid 103\n", "POLICIES        /d/policy\n", "ROOTS           /d/bundle.pem\n",
		"  curl -i http://127.0.0.1:20/\n      # 200: the frontend may GET orders\n", "# 403: guests may call nothing\n",
		"  curl -i -X POST http://127.0.0.1:21/\n      # 403: a payment needs an end user\n", `"Authorization: Bearer $(cat /d/tokens/user-valid)"`,
		"  build/castellan authz can-i --from guest/intruder --to orders GET / --explain\n      # denied, and by which rule\n", "Ctrl-C ends it",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in\n%s", want, out.String())
		}
	}
	if n := strings.Count(out.String(), "\n      # "); n != 5 {
		t.Errorf("%d commands to try, want five", n)
	}
	// Elsewhere the command needs to be told where.
	out.Reset()
	if err := sample().Describe(&out, "castellan", "/elsewhere/up.json"); err != nil || !strings.Contains(out.String(), "castellan authz can-i --up /elsewhere/up.json --from") {
		t.Errorf("%v\n%s", err, out.String())
	}
}
