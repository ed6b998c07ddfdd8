package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	castellanv1 "castellan.dev/api/castellan/v1"
)

// mesh is the real server and the real agent, each a process.
type mesh struct {
	t      *testing.T
	dir    string
	key    *rsa.PrivateKey
	server *process
	agent  *process
	grpc   string // of the server
	admin  string // of the agent
}

// process is a running binary whose log is kept.
type process struct {
	cmd  *exec.Cmd
	mu   sync.Mutex
	log  bytes.Buffer
	done chan struct{}
	err  error
}

func (p *process) text() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.log.String()
}

// binary builds a command of this module.
func binary(t *testing.T, dir, name string) string {
	t.Helper()
	out := filepath.Join(dir, name)
	if text, err := exec.Command("go", "build", "-o", out, "castellan.dev/cmd/"+name).CombinedOutput(); err != nil {
		t.Fatalf("building %s: %v\n%s", name, err, text)
	}
	return out
}

// launch starts a binary; the test ends it.
func launch(t *testing.T, path, config string) *process {
	t.Helper()
	p := &process{cmd: exec.Command(path, "-config", config), done: make(chan struct{})}
	stderr, err := p.cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(p.done)
		for lines := bufio.NewScanner(stderr); lines.Scan(); {
			p.mu.Lock()
			p.log.Write(append(lines.Bytes(), '\n'))
			p.mu.Unlock()
		}
		p.err = p.cmd.Wait()
	}()
	t.Cleanup(func() {
		p.end(syscall.SIGKILL)
		if t.Failed() {
			t.Logf("%s:\n%s", filepath.Base(path), p.text())
		}
	})
	return p
}

func (p *process) end(signal os.Signal) error {
	_ = p.cmd.Process.Signal(signal) // it may have ended
	<-p.done
	return p.err
}

func eventually(t *testing.T, check func() error) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("still: %v", err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// logged waits for a line with this message and returns one of its fields.
func (p *process) logged(t *testing.T, message, field string) string {
	t.Helper()
	var value string
	eventually(t, func() error {
		for line := range strings.Lines(p.text()) {
			var fields map[string]any
			if json.Unmarshal([]byte(line), &fields) == nil && fields["msg"] == message {
				value = fmt.Sprint(fields[field])
				return nil
			}
		}
		return fmt.Errorf("%q not logged", message)
	})
	return value
}

func (m *mesh) path(parts ...string) string {
	return filepath.Join(append([]string{m.dir}, parts...)...)
}

func (m *mesh) write(name, text string) string {
	m.t.Helper()
	path := m.path(name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		m.t.Fatal(err)
	}
	if err := os.WriteFile(path+".new", []byte(text), 0o600); err != nil {
		m.t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		m.t.Fatal(err)
	}
	return path
}

// token writes a service account's token as Kubernetes would sign it.
func (m *mesh) token(namespace, account string) string {
	m.t.Helper()
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.RS256, Key: m.key}, (&jose.SignerOptions{}).WithHeader("kid", "k1"))
	if err != nil {
		m.t.Fatal(err)
	}
	now := time.Now()
	text, err := jwt.Signed(signer).Claims(map[string]any{
		"iss": "https://issuer.test", "aud": []string{"castellan.dev"}, "sub": "system:serviceaccount:" + namespace + ":" + account,
		"iat": now.Unix(), "nbf": now.Unix(), "exp": now.Add(10 * time.Minute).Unix(),
		"kubernetes.io": map[string]any{
			"namespace": namespace, "node": map[string]string{"name": "local", "uid": "node-uid"},
			"pod":            map[string]string{"name": account + "-0", "uid": "uid-" + account},
			"serviceaccount": map[string]string{"name": account, "uid": "sa-" + account},
		},
	}).Serialize()
	if err != nil {
		m.t.Fatal(err)
	}
	return m.write("tokens/"+account, text)
}

const workloadsHead = "apiVersion: castellan.dev/v1alpha1\nkind: Workloads\nworkloads:\n"

func pod(namespace, account string) string {
	return fmt.Sprintf("- {namespace: %s, serviceAccount: %s, podUID: uid-%s, podName: %s-0, serviceAccountUID: sa-%s, node: local, labels: {app: %s}, address: 127.0.0.1}\n",
		namespace, account, account, account, account, account)
}

func startMesh(t *testing.T) *mesh {
	t.Helper()
	dir, err := os.MkdirTemp("", "mesh") // short: it holds sockets
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
	m.write("workloads.yaml", workloadsHead+pod("shop", "orders")+pod("shop", "frontend")+pod("castellan-system", "castellan-agent")+"services: []\n")
	if err := os.MkdirAll(m.path("policy"), 0o755); err != nil {
		t.Fatal(err)
	}
	m.server = launch(t, binary(t, dir, "castellan-server"), m.write("server.yaml", fmt.Sprintf(`
apiVersion: castellan.dev/v1alpha1
kind: ServerConfig
dataDir: %[1]s/data
listen: 127.0.0.1:0
http: 127.0.0.1:0
bundleFile: %[1]s/bundle.pem
servingNames: [127.0.0.1]
ca: {leafTTL: 6s}
attestation:
  issuers: [{issuer: "https://issuer.test", jwksFile: %[1]s/jwks.json}]
  workloadsFile: %[1]s/workloads.yaml
discovery: {policyDir: %[1]s/policy}
`, dir)))
	m.grpc = m.server.logged(t, "server started", "grpc")
	m.admin = "127.0.0.1:" + freePort(t)
	config := fmt.Sprintf(`
apiVersion: castellan.dev/v1alpha1
kind: AgentConfig
trustDomain: cluster.local
node: local
tokenFile: %[2]s
server: {address: "%[3]s", bundleFile: %[1]s/bundle.pem}
admin: %[4]s
workloads:
`, dir, m.token("castellan-system", "castellan-agent"), m.grpc, m.admin)
	for _, account := range []string{"orders", "frontend"} {
		config += fmt.Sprintf("- {namespace: shop, serviceAccount: %[1]s, socket: %[2]s/run/%[1]s.sock, uids: [%[3]d], tokenFile: %[4]s}\n",
			account, dir, os.Getuid(), m.token("shop", account))
	}
	m.agent = launch(t, binary(t, dir, "castellan-agent"), m.write("agent.yaml", config))
	eventually(t, func() error {
		code, body, err := m.get("/readyz?verbose")
		if err != nil || code == http.StatusOK {
			return err
		}
		return fmt.Errorf("%s", body)
	})
	return m
}

func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	return port
}

func (m *mesh) get(path string) (int, string, error) {
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Get("http://" + m.admin + path)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(body), err
}

func (m *mesh) socket(account string) string { return "unix://" + m.path("run", account+".sock") }

func TestAgainstTheRealServer(t *testing.T) {
	if testing.Short() {
		t.Skip("builds and runs both binaries")
	}
	m := startMesh(t)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr(m.socket("orders"))))
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()

	t.Run("X509-SVID of a real chain", func(t *testing.T) {
		got, err := source.GetX509SVID()
		if err != nil || got.ID.String() != "spiffe://cluster.local/ns/shop/sa/orders" || len(got.Certificates) < 2 {
			t.Fatalf("got %v %v", got, err)
		}
		if _, _, err := x509svid.Verify(got.Certificates, source); err != nil {
			t.Error(err)
		}
	})
	t.Run("rotated in time, over more than one whole life", func(t *testing.T) {
		serials := map[string]bool{}
		for len(serials) < 4 {
			got, err := source.GetX509SVID()
			if err != nil {
				t.Fatal(err)
			}
			if left := time.Until(got.Certificates[0].NotAfter); left <= 0 {
				t.Fatalf("served %v after it expired", -left)
			}
			serials[got.Certificates[0].SerialNumber.String()] = true
			if len(serials) < 4 {
				select {
				case <-source.Updated():
				case <-ctx.Done():
					t.Fatal("not rotated")
				}
			}
		}
	})
	t.Run("JWT-SVID minted, bundled and validated", func(t *testing.T) {
		jwts, err := workloadapi.NewJWTSource(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr(m.socket("orders"))))
		if err != nil {
			t.Fatal(err)
		}
		defer jwts.Close()
		svid, err := jwts.FetchJWTSVID(ctx, jwtsvid.Params{Audience: "frontend"})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := jwtsvid.ParseAndValidate(svid.Marshal(), jwts, []string{"frontend"}); err != nil {
			t.Error(err)
		}
		got, err := workloadapi.ValidateJWTSVID(ctx, svid.Marshal(), "frontend", workloadapi.WithAddr(m.socket("frontend")))
		if err != nil || got.ID != svid.ID {
			t.Errorf("got %v %v", got, err)
		}
	})
	t.Run("policy reaches the workload's own stream within a second", func(t *testing.T) { m.policy(ctx, t) })
	t.Run("a workload that is gone is refused when what it has expires, and no other is", func(t *testing.T) {
		m.write("workloads.yaml", workloadsHead+pod("shop", "frontend")+pod("castellan-system", "castellan-agent")+"services: []\n")
		eventually(t, func() error {
			_, err := workloadapi.FetchX509SVID(ctx, workloadapi.WithAddr(m.socket("orders")))
			if status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "no identity issued") {
				return fmt.Errorf("got %w", err)
			}
			return nil
		})
		if _, err := workloadapi.FetchX509SVID(ctx, workloadapi.WithAddr(m.socket("frontend"))); err != nil {
			t.Errorf("frontend: %v", err)
		}
		m.write("workloads.yaml", workloadsHead+pod("shop", "orders")+pod("shop", "frontend")+pod("castellan-system", "castellan-agent")+"services: []\n")
		eventually(t, func() error {
			_, err := workloadapi.FetchX509SVID(ctx, workloadapi.WithAddr(m.socket("orders")))
			return err
		})
	})
	t.Run("metrics", func(t *testing.T) {
		_, text, err := m.get("/metrics")
		for _, name := range []string{"castellan_agent_rotations_total", "castellan_agent_svid_expiry_seconds", "castellan_agent_push_seconds_bucket", "castellan_agent_server_connected 1"} {
			if err != nil || !strings.Contains(text, name) {
				t.Errorf("no %s: %v", name, err)
			}
		}
	})
	t.Run("SIGTERM ends it cleanly", func(t *testing.T) {
		if err := m.agent.end(syscall.SIGTERM); err != nil {
			t.Errorf("exit: %v", err)
		}
		if left, _ := filepath.Glob(m.path("run", "*")); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
		for _, secret := range []string{"PRIVATE KEY", "Bearer", "eyJ"} {
			if strings.Contains(m.agent.text(), secret) {
				t.Errorf("log holds %q", secret)
			}
		}
	})
}

// policy adds a policy file and waits for it on the socket's stream.
func (m *mesh) policy(ctx context.Context, t *testing.T) {
	conn, err := grpc.NewClient(m.socket("orders"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	stream, err := discoveryv3.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(ctx)
	if err != nil {
		t.Fatal(err)
	}
	const url = "type.googleapis.com/castellan.v1.WorkloadPolicy"
	ask := &discoveryv3.DeltaDiscoveryRequest{Node: &corev3.Node{Id: "proxy-1"}, TypeUrl: url}
	version := ""
	next := func() *castellanv1.WorkloadPolicy {
		t.Helper()
		if err := stream.Send(ask); err != nil {
			t.Fatal(err)
		}
		resp, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		ask = &discoveryv3.DeltaDiscoveryRequest{TypeUrl: url, ResponseNonce: resp.GetNonce()}
		p := &castellanv1.WorkloadPolicy{}
		if len(resp.GetResources()) != 1 || resp.GetResources()[0].GetName() != "uid-orders" || resp.GetResources()[0].GetResource().UnmarshalTo(p) != nil {
			t.Fatalf("got %v", resp)
		}
		version = resp.GetResources()[0].GetVersion()
		return p
	}
	if n := len(next().GetDocuments()); n != 0 {
		t.Errorf("%d documents before there is a policy", n)
	}
	m.write("policy/deny.yaml", "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: deny, namespace: shop}\nspec: {selector: {matchLabels: {app: orders}}, action: DENY, rules: [{to: [{operation: {methods: [DELETE]}}]}]}\n")
	written := time.Now()
	if p := next(); len(p.GetDocuments()) != 1 {
		t.Errorf("got %v", p)
	}
	if took := time.Since(written); took > time.Second {
		t.Logf("policy took %v, want a second at most (a busy machine?)", took)
	}
	if err := stream.Send(ask); err != nil { // the last answer
		t.Fatal(err)
	}
	// What the proxy is given and acknowledges is, through the agent, the server's
	// own version: by it the server knows what is applied.
	admin, err := grpc.NewClient("unix://"+m.path("data", "admin.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = admin.Close() }()
	eventually(t, func() error {
		status, err := castellanv1.NewDiscoveryAdminClient(admin).Policies(ctx, &castellanv1.PoliciesRequest{})
		if err != nil {
			return err
		}
		for _, w := range status.GetWorkloads() {
			if w.GetPodUid() == "uid-orders" && w.GetVersion() != version {
				return fmt.Errorf("the server offers version %q, the socket %q", w.GetVersion(), version)
			}
		}
		for _, p := range status.GetPolicies() {
			if p.GetName() == "deny" && p.GetSelected() == 1 && p.GetProgrammed() == 1 {
				return nil
			}
		}
		return fmt.Errorf("the acknowledgement is not known: %v", status)
	})
}
