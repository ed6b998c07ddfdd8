package main

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"castellan.dev/agent/csi/csitest"
)

const crowd = 500

// startCrowd starts a real server that knows crowd pods of 20 accounts, and a real
// agent of their node.
func startCrowd(t *testing.T) (*mesh, *csitest.Kubelet, []csitest.Arrival) {
	t.Helper()
	dir, err := os.MkdirTemp("", "crowd") // short: it holds sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	m := &mesh{t: t, dir: dir}
	if m.key, err = rsa.GenerateKey(rand.Reader, 2048); err != nil {
		t.Fatal(err)
	}
	jwks, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: m.key.Public(), KeyID: "k1", Algorithm: "RS256", Use: "sig"}}})
	if err != nil {
		t.Fatal(err)
	}
	m.write("jwks.json", string(jwks))
	agent := csitest.Pod{Namespace: "castellan-system", ServiceAccount: "castellan-agent", Name: "castellan-agent-0", UID: "uid-agent"}
	arrivals := make([]csitest.Arrival, crowd)
	list := strings.Builder{}
	list.WriteString(workloadsHead + row(agent))
	for i := range arrivals {
		p := csitest.Pod{Namespace: "shop", ServiceAccount: fmt.Sprintf("app-%d", i%20), Name: fmt.Sprintf("app-%d", i), UID: fmt.Sprintf("uid-%d", i)}
		arrivals[i] = csitest.Arrival{Pod: p, Token: m.sign(p)}
		list.WriteString(row(p))
	}
	m.write("workloads.yaml", list.String()+"services: []\n")
	for _, d := range []string{"policy", "kubelet/plugins_registry"} {
		if err := os.MkdirAll(m.path(d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	m.server = launch(t, binary(t, dir, "castellan-server"), m.write("server.yaml", fmt.Sprintf(`
apiVersion: castellan.dev/v1alpha1
kind: ServerConfig
dataDir: %[1]s/data
listen: 127.0.0.1:0
http: 127.0.0.1:0
bundleFile: %[1]s/bundle.pem
servingNames: [127.0.0.1]
attestation:
  issuers: [{issuer: "https://issuer.test", jwksFile: %[1]s/jwks.json}]
  workloadsFile: %[1]s/workloads.yaml
discovery: {policyDir: %[1]s/policy}
`, dir)))
	m.admin = "127.0.0.1:" + freePort(t)
	m.agent = launch(t, binary(t, dir, "castellan-agent"), m.write("agent.yaml", fmt.Sprintf(`
apiVersion: castellan.dev/v1alpha1
kind: AgentConfig
trustDomain: cluster.local
node: local
tokenFile: %[2]s
server: {address: "%[3]s", bundleFile: %[1]s/bundle.pem}
admin: %[4]s
adminSocket: %[1]s/admin.sock
csi: {kubeletDir: %[1]s/kubelet, stateDir: %[1]s/state}
`, dir, m.write("agent.token", m.sign(agent)), m.server.logged(t, "server started", "grpc"), m.admin)))
	kubelet := &csitest.Kubelet{Dir: m.path("kubelet")}
	if err := kubelet.Register(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		code, body, err := m.get("/readyz?verbose")
		if err != nil || code == http.StatusOK {
			return err
		}
		return fmt.Errorf("%s", body)
	})
	return m, kubelet, arrivals
}

func row(p csitest.Pod) string {
	return fmt.Sprintf("- {namespace: %s, serviceAccount: %s, podUID: %s, podName: %s, serviceAccountUID: sa-%s, node: local}\n",
		p.Namespace, p.ServiceAccount, p.UID, p.Name, p.ServiceAccount)
}

// sign makes a token as Kubernetes would for p.
func (m *mesh) sign(p csitest.Pod) string {
	m.t.Helper()
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.RS256, Key: m.key}, (&jose.SignerOptions{}).WithHeader("kid", "k1"))
	if err != nil {
		m.t.Fatal(err)
	}
	now := time.Now()
	text, err := jwt.Signed(signer).Claims(map[string]any{
		"iss": "https://issuer.test", "aud": []string{"castellan.dev"}, "sub": "system:serviceaccount:" + p.Namespace + ":" + p.ServiceAccount,
		"iat": now.Unix(), "nbf": now.Unix(), "exp": now.Add(time.Hour).Unix(),
		"kubernetes.io": map[string]any{
			"namespace": p.Namespace, "node": map[string]string{"name": "local", "uid": "node-uid"},
			"pod":            map[string]string{"name": p.Name, "uid": p.UID},
			"serviceaccount": map[string]string{"name": p.ServiceAccount, "uid": "sa-" + p.ServiceAccount},
		},
	}).Serialize()
	if err != nil {
		m.t.Fatal(err)
	}
	return text
}

// TestFiveHundredPodsAtOnce: a node that comes back, or a rollout: each pod has its
// own certificate, in time, and a killed agent's pods have theirs again.
func TestFiveHundredPodsAtOnce(t *testing.T) {
	if testing.Short() {
		t.Skip("builds and runs both binaries")
	}
	m, kubelet, arrivals := startCrowd(t)
	idle := m.agent.resident(t)
	// Ten times what docs/performance.md promises.
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Second)
	defer cancel()
	took, err := kubelet.Storm(ctx, arrivals, 50)
	if err != nil {
		t.Fatal(err)
	}
	full := m.agent.resident(t)
	t.Logf("%d pods: half had their certificate after %s, all after %s; the agent grew by %d kB a pod (%d kB to %d kB)",
		crowd, took[crowd/2], took[crowd-1], (full-idle)/crowd, idle, full)

	t.Run("killed and started again", func(t *testing.T) {
		if err := m.agent.end(syscall.SIGKILL); err == nil {
			t.Fatal("not killed")
		}
		begin := time.Now()
		m.agent = launch(t, m.path("castellan-agent"), m.path("agent.yaml"))
		ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
		defer cancel()
		for _, a := range arrivals { // no publication
			conn, err := kubelet.Conn(a.Pod)
			if err != nil {
				t.Fatal(err)
			}
			_, err = csitest.Certificate(ctx, conn)
			conn.Close()
			if err != nil {
				t.Fatalf("%s: %v", a.Pod.Name, err)
			}
		}
		t.Logf("all served again after %s", time.Since(begin))
	})
}

// resident returns the process's resident memory in kB.
func (p *process) resident(t *testing.T) int {
	t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			kb, err := strconv.Atoi(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(rest), "kB")))
			if err != nil {
				t.Fatal(err)
			}
			return kb
		}
	}
	t.Fatal("no VmRSS")
	return 0
}
