package e2e_test

import (
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
)

func TestSampleMesh(t *testing.T) {
	m := start(t, shortDir(t))
	f := m.file()

	t.Run("policies hold as the table says", func(t *testing.T) {
		valid, noGroup, expired := bearer(t, f.JWT.ValidToken), bearer(t, f.JWT.NoGroupToken), bearer(t, f.JWT.ExpiredToken)
		for _, c := range []struct {
			from, to, method, token string
			want                    int
		}{
			{"shop/frontend", "orders", "GET", "", 200},
			{"shop/frontend", "orders", "POST", "", 403},
			{"shop/frontend", "orders", "DELETE", "", 403},
			{"shop/payments", "orders", "GET", "", 403},
			{"guest/intruder", "orders", "GET", "", 403},
			{"guest/intruder", "frontend", "GET", "", 403},
			{"guest/intruder", "payments", "POST", valid, 403},
			{"shop/frontend", "payments", "POST", "", 403},
			{"shop/frontend", "payments", "POST", valid, 200},
			{"shop/frontend", "payments", "GET", valid, 403},
			{"shop/frontend", "payments", "POST", noGroup, 403},
			{"shop/frontend", "payments", "POST", expired, 401},
			{"shop/frontend", "payments", "POST", "Bearer x.y.z", 401},
			{"shop/orders", "payments", "POST", valid, 403},
			{"shop/orders", "frontend", "GET", "", 200},
		} {
			var header []string
			if c.token != "" {
				header = []string{"Authorization", c.token}
			}
			got, body, err := m.ask(c.from, c.to, c.method, "/", header...)
			if err != nil || got != c.want {
				t.Errorf("%s -> %s %s: %d %q %v, want %d", c.from, c.to, c.method, got, body, err, c.want)
			}
			if got == 200 && len(body) != 1024 {
				t.Errorf("%s -> %s: body of %d bytes, want 1024", c.from, c.to, len(body))
			}
			if got != 200 && (strings.Count(body, "\n") != 1 || strings.Contains(body, "spiffe") || strings.Contains(body, "rule")) {
				t.Errorf("%s -> %s: refusal %q is not one constant line", c.from, c.to, body)
			}
		}
	})

	t.Run("up.json has the promised shape", func(t *testing.T) {
		data, err := os.ReadFile(m.path("up.json"))
		if err != nil {
			t.Fatal(err)
		}
		var raw struct {
			TrustDomain, Bundle, PolicyDir string
			Server, Agent, JWT             map[string]any
			Workloads                      map[string]map[string]any
		}
		if err := json.Unmarshal(data, &raw); err != nil {
			t.Fatal(err)
		}
		if raw.TrustDomain != "cluster.local" {
			t.Errorf("trust domain %q", raw.TrustDomain)
		}
		for _, p := range []any{raw.Bundle, raw.PolicyDir, raw.Agent["token"], raw.JWT["jwks"], raw.JWT["validToken"], raw.JWT["noGroupToken"], raw.JWT["expiredToken"]} {
			if s, _ := p.(string); !filepath.IsAbs(s) {
				t.Errorf("%v is no absolute path", p)
			} else if _, err := os.Stat(s); err != nil {
				t.Error(err)
			}
		}
		if got := slices.Sorted(maps.Keys(raw.Workloads)); !slices.Equal(got, []string{"guest/intruder", "shop/frontend", "shop/orders", "shop/payments"}) {
			t.Errorf("workloads %v", got)
		}
		for name, w := range raw.Workloads {
			for _, k := range []string{"inbound", "app", "admin"} {
				if _, _, err := net.SplitHostPort(fmt.Sprint(w[k])); err != nil {
					t.Errorf("%s %s: %v", name, k, err)
				}
			}
			out, _ := w["outbound"].(map[string]any)
			if got := slices.Sorted(maps.Keys(out)); !slices.Equal(got, []string{"frontend", "orders", "payments"}) {
				t.Errorf("%s outbound %v", name, got)
			}
			for _, k := range []string{"socket", "token"} {
				if s := fmt.Sprint(w[k]); !filepath.IsAbs(s) {
					t.Errorf("%s %s: %q", name, k, s)
				}
			}
			if pid, _ := w["pid"].(float64); syscall.Kill(int(pid), 0) != nil {
				t.Errorf("%s: no process %v", name, w["pid"])
			}
		}
	})

	t.Run("admin addresses answer", func(t *testing.T) {
		addrs := []string{f.Server.HTTP, f.Agent.Admin}
		for _, w := range f.Workloads {
			addrs = append(addrs, w.Admin)
		}
		for _, a := range addrs {
			for _, p := range []string{"/livez", "/readyz", "/metrics"} {
				resp, err := plainClient.Get("http://" + a + p)
				if err != nil {
					t.Error(err)
					continue
				}
				resp.Body.Close()
				if resp.StatusCode != 200 {
					t.Errorf("%s%s: %s", a, p, resp.Status)
				}
			}
		}
	})

	t.Run("everything listens on loopback only", func(t *testing.T) {
		data, err := os.ReadFile(m.path("state.json"))
		if err != nil {
			t.Fatal(err)
		}
		var state struct{ Ports map[string]int }
		if err := json.Unmarshal(data, &state); err != nil {
			t.Fatal(err)
		}
		tcp, err := os.ReadFile("/proc/net/tcp")
		if err != nil {
			t.Fatal(err)
		}
		tcp6, _ := os.ReadFile("/proc/net/tcp6")
		for name, port := range state.Ports {
			hex := fmt.Sprintf(":%04X ", port)
			for line := range strings.SplitSeq(string(tcp)+string(tcp6), "\n") {
				fields := strings.Fields(line)
				if len(fields) < 4 || fields[3] != "0A" || !strings.HasSuffix(fields[1]+" ", hex) {
					continue
				}
				if !strings.HasPrefix(fields[1], "0100007F:") {
					t.Errorf("%s listens on %s", name, fields[1])
				}
			}
		}
	})

	t.Run("the commands agree with the mesh", func(t *testing.T) {
		castellan(t, "check", "--up", m.path("up.json")).want(t, 0)
		castellan(t, "authz", "can-i", "--up", m.path("up.json"), "--from", "shop/frontend", "--to", "orders", "GET", "/").want(t, 0, "allowed")
		castellan(t, "authz", "can-i", "--up", m.path("up.json"), "--from", "guest/intruder", "--to", "orders", "GET", "/").want(t, 2, "denied", "guests-call-nothing")
		castellan(t, "cert", "inspect", "unix:"+f.Workloads["shop/orders"].Socket).want(t, 0, "spiffe://cluster.local/ns/shop/sa/orders")
		castellan(t, "ca", "issued", "--up", m.path("up.json"), "--id", "spiffe://cluster.local/ns/shop/sa/orders").want(t, 0, "issued")
		castellan(t, "ca", "status", "--up", m.path("up.json")).want(t, 0, "svid-issuer")
	})

	t.Run("a second one on the directory is refused", func(t *testing.T) {
		castellan(t, "up", "--data-dir", m.dir).want(t, 1, "in use by another")
	})
}

func TestRestartKeepsRootAndPorts(t *testing.T) {
	dir := shortDir(t)
	m := start(t, dir)
	before := m.file()
	root, err := os.ReadFile(before.Bundle)
	if err != nil {
		t.Fatal(err)
	}
	m.stop()
	if syscall.Kill(before.Server.PID, 0) == nil {
		t.Errorf("the server outlived castellan up")
	}
	m = start(t, dir)
	after := m.file()
	again, err := os.ReadFile(after.Bundle)
	if err != nil {
		t.Fatal(err)
	}
	if string(root) != string(again) {
		t.Error("the root changed")
	}
	if before.Server.GRPC != after.Server.GRPC || before.Workloads["shop/orders"].Inbound != after.Workloads["shop/orders"].Inbound {
		t.Error("ports changed")
	}
	m.wantStatus("shop/frontend", "orders", "GET", "/", 200)
	m.stop()
	castellan(t, "up", "--data-dir", dir, "--trust-domain", "other.example").want(t, 3, `holds the trust domain "cluster.local"`)
}

func TestDeadPartsComeBack(t *testing.T) {
	m := start(t, shortDir(t))
	first := m.file()
	for _, part := range []struct {
		name string
		pid  func() int
	}{
		{"server", func() int { return m.file().Server.PID }},
		{"agent", func() int { return m.file().Agent.PID }},
		{"proxy of orders", func() int { return m.file().Workloads["shop/orders"].PID }},
	} {
		old := part.pid()
		if err := syscall.Kill(old, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		eventually(t, part.name+" comes back", func() error {
			if pid := part.pid(); pid == old || syscall.Kill(pid, 0) != nil {
				return fmt.Errorf("pid is still %d", pid)
			}
			return nil
		})
		m.wantStatus("shop/frontend", "orders", "GET", "/", 200)
	}
	now := m.file()
	if first.Server.GRPC != now.Server.GRPC || first.Agent.Admin != now.Agent.Admin {
		t.Error("ports changed")
	}
	for _, a := range []string{now.Server.HTTP, now.Agent.Admin} {
		eventually(t, a+" is ready", func() error { return ready(a) })
	}
	eventually(t, "check is content", func() error {
		if r := castellan(t, "check", "--up", m.path("up.json")); r.code != 0 {
			return fmt.Errorf("%s", r.out)
		}
		return nil
	})
}

func TestKilledUpLeavesNothing(t *testing.T) {
	dir := shortDir(t)
	m := start(t, dir)
	f := m.file()
	if err := m.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-m.done
	for name, pid := range map[string]int{"server": f.Server.PID, "agent": f.Agent.PID, "proxy": f.Workloads["shop/orders"].PID} {
		eventually(t, name+" ends too", func() error {
			// A zombie waits for its new parent; it is dead all the same.
			stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
			if err != nil || strings.Contains(string(stat), ") Z ") {
				return nil
			}
			return fmt.Errorf("process %d lives", pid)
		})
	}
	start(t, dir).wantStatus("shop/frontend", "orders", "GET", "/", 200)
}

func TestUpRefusesBadInput(t *testing.T) {
	long := filepath.Join(shortDir(t), strings.Repeat("long", 30))
	for _, c := range []struct {
		name string
		args []string
		want string
	}{
		{"socket path too long", []string{"--data-dir", long}, "the kernel takes 107"},
		{"trust domain like an address", []string{"--data-dir", shortDir(t), "--trust-domain", "10.0.0.1"}, "looks like an IP address"},
		{"trust domain with an empty label", []string{"--data-dir", shortDir(t), "--trust-domain", "a..b"}, "empty label"},
		{"svid ttl too short", []string{"--data-dir", shortDir(t), "--svid-ttl", "1s"}, "--svid-ttl"},
		{"svid ttl too long", []string{"--data-dir", shortDir(t), "--svid-ttl", "48h"}, "--svid-ttl"},
		{"policy directory missing", []string{"--data-dir", shortDir(t), "--policy-dir", "/does/not/exist"}, "is not a directory"},
		{"unknown flag", []string{"--no-such-flag"}, "unknown flag"},
	} {
		t.Run(c.name, func(t *testing.T) {
			castellan(t, append([]string{"up"}, c.args...)...).want(t, 3, c.want)
		})
	}
}

// TestUpRefusesAForeignDirectory: what another user prepared is not used, nor a
// link followed.
func TestUpRefusesAForeignDirectory(t *testing.T) {
	foreign := shortDir(t)
	if os.Getuid() == 0 {
		if err := os.Chown(foreign, 65534, 65534); err != nil {
			t.Fatal(err)
		}
		castellan(t, "up", "--data-dir", foreign).want(t, 3, "belongs to another user")
	}
	open := shortDir(t)
	if err := os.Chmod(open, 0o777); err != nil {
		t.Fatal(err)
	}
	castellan(t, "up", "--data-dir", open).want(t, 3, "others may write", "chmod")
	linked := shortDir(t)
	if err := os.Symlink(shortDir(t), filepath.Join(linked, "tokens")); err != nil {
		t.Fatal(err)
	}
	castellan(t, "up", "--data-dir", linked).want(t, 3, "is not a directory")
}

func TestUpSaysWhichPortIsTaken(t *testing.T) {
	dir := shortDir(t)
	m := start(t, dir)
	addr := m.file().Server.GRPC
	m.stop()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	castellan(t, "up", "--data-dir", dir).want(t, 1, addr, "server/grpc", "in use by another program")
}

func TestUpJSONOutput(t *testing.T) {
	m := start(t, shortDir(t), "-o", "json", "--trust-domain", "shop.example")
	eventually(t, "stdout holds up.json", func() error {
		var f struct{ TrustDomain string }
		if err := json.Unmarshal([]byte(m.stdout.String()), &f); err != nil {
			return err
		}
		if f.TrustDomain != "shop.example" {
			return fmt.Errorf("%q", f.TrustDomain)
		}
		return nil
	})
	// "cluster.local" in the samples stands for the mesh's own trust domain.
	m.wantStatus("shop/frontend", "orders", "GET", "/", 200)
	m.wantStatus("guest/intruder", "orders", "GET", "/", 403)
}
