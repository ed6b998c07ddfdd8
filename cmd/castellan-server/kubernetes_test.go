package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	istiov1 "istio.io/api/security/v1alpha1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"castellan.dev/ca/attest/attesttest"
	"castellan.dev/internal/jws"
	"castellan.dev/internal/jws/jwstest"
	"castellan.dev/internal/kube/kubetest"
	"castellan.dev/internal/workloads"
)

const (
	castellanSystem = "/api/v1/namespaces/castellan-system/"
	leasePath       = "/apis/coordination.k8s.io/v1/namespaces/castellan-system/leases/castellan-server"
)

// clusterSite is a server that runs on Kubernetes, and the API server.
type clusterSite struct {
	*site
	api *kubetest.Server
	// pods are what the API server reviews tokens by.
	pods *workloads.File
}

func newClusterSite(t *testing.T, verification string) *clusterSite {
	t.Helper()
	c := &clusterSite{site: newSite(t), api: kubetest.New(t), pods: &workloads.File{}}
	c.api.Issuer, c.api.JWKS = c.issuer.Name, jwstest.JWKS(t, c.issuer)
	reviewer := &attesttest.Reviewer{Issuer: c.issuer.Name, Pods: func() *workloads.File { return c.pods },
		Keys: func() (*jws.KeySet, error) { return jws.ParseJWKS(c.api.JWKS) }}
	c.api.Review = func(token string, audiences []string) map[string]any {
		r, err := reviewer.Review(context.Background(), token, audiences)
		if err != nil {
			return map[string]any{"authenticated": false, "error": err.Error()}
		}
		return map[string]any{"authenticated": true, "audiences": r.Audiences, "user": map[string]any{
			"username": "system:serviceaccount:" + r.Namespace + ":" + r.Account, "uid": r.AccountUID,
			"extra": map[string]any{
				"authentication.kubernetes.io/pod-name": []string{r.PodName}, "authentication.kubernetes.io/pod-uid": []string{r.PodUID},
				"authentication.kubernetes.io/node-name": []string{r.Node}, "authentication.kubernetes.io/node-uid": []string{r.NodeUID},
			},
		}}
	}
	c.api.Put(castellanSystem+"secrets/castellan-ca", &corev1.Secret{Type: corev1.SecretTypeOpaque})
	c.api.Put(leasePath, &coordinationv1.Lease{})
	c.addPod(agentPodOf("node-a"))
	c.write("server.yaml", fmt.Sprintf(`apiVersion: castellan.dev/v1alpha1
kind: ServerConfig
dataDir: %s/data
listen: %s
http: %s
kubernetes: {kubeconfig: %s, verification: %s}
webhook: {listen: "%s"}
`, c.dir, c.grpc, c.http, c.api.Kubeconfig(), verification, freePort(t)))
	return c
}

func agentPodOf(node string) jwstest.Pod {
	return jwstest.Pod{Namespace: "castellan-system", Account: "castellan-agent", AccountUID: "sa-agent", Name: "agent-" + node, UID: "pod-agent-" + node, Node: node, NodeUID: "uid-" + node}
}

func shopPod(i int) jwstest.Pod {
	return jwstest.Pod{Namespace: "shop", Account: "orders", AccountUID: "sa-orders", Name: fmt.Sprint("orders-", i), UID: fmt.Sprint("pod-", i), Node: "node-a", NodeUID: "uid-node-a"}
}

func podPath(p jwstest.Pod) string { return "/api/v1/namespaces/" + p.Namespace + "/pods/" + p.Name }

func (c *clusterSite) addPod(p jwstest.Pod) {
	account := "/api/v1/namespaces/" + p.Namespace + "/serviceaccounts/" + p.Account
	if !c.api.Get(account, &corev1.ServiceAccount{}) {
		c.api.Put(account, &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{UID: types.UID(p.AccountUID)}})
	}
	c.api.Put(podPath(p), &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{UID: types.UID(p.UID)},
		Spec:       corev1.PodSpec{NodeName: p.Node, ServiceAccountName: p.Account},
		Status:     corev1.PodStatus{Phase: corev1.PodRunning},
	})
	c.pods.Workloads = append(c.pods.Workloads, workloads.Workload{Namespace: p.Namespace, ServiceAccount: p.Account,
		ServiceAccountUID: p.AccountUID, PodName: p.Name, PodUID: p.UID, Node: p.Node})
}

// connect trusts what the server publishes in the cluster.
func (c *clusterSite) connect() *grpc.ClientConn {
	c.t.Helper()
	var bundle corev1.ConfigMap
	deadline := time.Now().Add(30 * time.Second)
	for !c.api.Get(castellanSystem+"configmaps/castellan-bundle", &bundle) || bundle.Data["bundle.pem"] == "" {
		if time.Now().After(deadline) {
			c.t.Fatal("the roots are not published")
		}
		<-time.After(5 * time.Millisecond)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM([]byte(bundle.Data["bundle.pem"])) {
		c.t.Fatalf("published: %q", bundle.Data["bundle.pem"])
	}
	return c.dial(&tls.Config{RootCAs: roots, ServerName: "localhost"})
}

// token returns another one each time, as the API server does.
func (c *clusterSite) token(p jwstest.Pod) string {
	return c.issuer.Sign(c.t, c.issuer.PodClaims(time.Now(), p, "castellan.dev").With(jwstest.Claims{"jti": rand.Text()}))
}

// ask asks for a certificate of a pod through the agent of a node.
func (c *clusterSite) ask(conn *grpc.ClientConn, workload, agent string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+workload, "castellan-agent-token", agent)
	_, err = istiov1.NewIstioCertificateServiceClient(conn).CreateCertificate(ctx, &istiov1.IstioCertificateRequest{
		Csr: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))})
	return err
}

// background tells apart what the server asks of the API server by itself.
func background(r kubetest.Request) bool {
	return r.Path == leasePath || strings.Contains(r.Path, "castellan-bundle") || strings.Contains(r.Path, "webhookconfigurations") ||
		strings.Contains(r.Path, "security.istio.io") || strings.HasSuffix(r.Path, "/configmaps") || strings.HasSuffix(r.Path, "/nodes")
}

// TestNoCallPerRequest: in local mode certificates of pods that are known cost the
// API server nothing: a storm of requests makes no request there.
func TestNoCallPerRequest(t *testing.T) {
	c := newClusterSite(t, "local")
	const pods = 100
	var tokens []string
	for i := range pods {
		c.addPod(shopPod(i))
		tokens = append(tokens, c.token(shopPod(i)))
	}
	c.api.Start()
	stop, out := c.start()
	conn, agent := c.connect(), c.token(agentPodOf("node-a"))
	if err := c.ask(conn, agent, agent); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	c.api.Requests()
	var wg sync.WaitGroup
	for i := range 5 * pods {
		wg.Go(func() {
			if err := c.ask(conn, tokens[i%pods], agent); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	made := slices.DeleteFunc(c.api.Requests(), background)
	if len(made) != 0 {
		t.Errorf("%d requests to the API server for %d certificates: %v", len(made), 5*pods, made)
	}
	if err := stop(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

// TestOnKubernetes: both modes, from an API server that is not there at first to the
// end of the process.
func TestOnKubernetes(t *testing.T) {
	for _, verification := range []string{"local", "tokenReview"} {
		t.Run(verification, func(t *testing.T) { onKubernetes(t, newClusterSite(t, verification)) })
	}
}

func onKubernetes(t *testing.T, c *clusterSite) {
	c.addPod(shopPod(1))
	out := &log{}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- start(ctx, []string{"-config", c.path("server.yaml")}, out) }()
	stop := sync.OnceValue(func() error { cancel(); return <-done })
	t.Cleanup(func() { _ = stop() })
	waitFor := func(what string, is func() bool) {
		t.Helper()
		for deadline := time.Now().Add(30 * time.Second); !is(); {
			if time.Now().After(deadline) {
				_, body := c.get("/readyz?verbose")
				t.Fatalf("%s: not within 30 s\n%s%s", what, body, out)
			}
			<-time.After(10 * time.Millisecond)
		}
	}
	waitFor("alive and waiting", func() bool {
		live, _ := c.get("/livez")
		ready, body := c.get("/readyz?verbose")
		return live == http.StatusOK && ready == http.StatusServiceUnavailable && strings.Contains(body, "waiting for the authority's keys") &&
			strings.Contains(out.String(), "waiting for the API server")
	})
	c.api.Start()
	waitFor("ready", func() bool { code, _ := c.get("/readyz"); return code == http.StatusOK })
	conn := c.connect()
	agent, thief, orders := c.token(agentPodOf("node-a")), agentPodOf("node-b"), c.token(shopPod(1))
	if err := c.ask(conn, orders, agent); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	c.addPod(thief)
	if err := c.ask(conn, orders, c.token(thief)); status.Code(err) != codes.PermissionDenied {
		t.Errorf("stolen to the other node: %v", err)
	}
	// A pod that is newer than what the informers have heard is asked for.
	c.addPod(shopPod(2))
	if err := c.ask(conn, c.token(shopPod(2)), agent); err != nil {
		t.Errorf("a new pod: %v", err)
	}
	c.api.Delete(podPath(shopPod(1)))
	waitFor("a deleted pod is refused", func() bool { return status.Code(c.ask(conn, orders, agent)) == codes.PermissionDenied })
	c.keysAreInTheSecret(t)
	// The API server goes: who is known is served on, and readiness stays.
	c.api.Stop()
	fresh := c.token(shopPod(2))
	if err, want := c.ask(conn, fresh, agent), map[bool]codes.Code{true: codes.OK, false: codes.Unavailable}[c.local()]; status.Code(err) != want {
		t.Errorf("a known pod, with a new token, while the API server is away: %v, want %v", err, want)
	}
	if err := c.ask(conn, c.token(shopPod(3)), agent); status.Code(err) != codes.Unavailable {
		t.Errorf("an unknown pod while the API server is away: %v", err)
	}
	if code, body := c.get("/readyz?verbose"); code != http.StatusOK {
		t.Errorf("readiness went with the API server:\n%s", body)
	}
	c.api.Start()
	waitFor("served again", func() bool { return c.ask(conn, fresh, agent) == nil })
	waitFor("leading", func() bool { _, m := c.get("/metrics"); return strings.Contains(m, "castellan_server_leading 1") })
	c.ends(t, conn, cancel, fresh, agent)
	if err := stop(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	var lease coordinationv1.Lease
	if !c.api.Get(leasePath, &lease) || lease.Spec.HolderIdentity != nil && *lease.Spec.HolderIdentity != "" {
		t.Errorf("the Lease was not given back: %+v", lease.Spec)
	}
}

func (c *clusterSite) local() bool {
	data, err := os.ReadFile(c.path("server.yaml"))
	return err == nil && strings.Contains(string(data), "verification: local")
}

// keysAreInTheSecret: and nowhere on the volume.
func (c *clusterSite) keysAreInTheSecret(t *testing.T) {
	t.Helper()
	var secret corev1.Secret
	if !c.api.Get(castellanSystem+"secrets/castellan-ca", &secret) || len(secret.Data) != 5 || !strings.Contains(string(secret.Data["root.pem"]), "PRIVATE KEY") {
		t.Errorf("the Secret holds %d documents", len(secret.Data))
	}
	err := filepath.WalkDir(c.path("data"), func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		data, err := os.ReadFile(path)
		if err == nil && strings.Contains(string(data), "PRIVATE KEY") {
			t.Errorf("%s holds a private key", path)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// ends: readiness goes first, and for a moment whoever has not heard is answered.
func (c *clusterSite) ends(t *testing.T, conn *grpc.ClientConn, cancel func(), workload, agent string) {
	t.Helper()
	cancel()
	if code, body := c.get("/readyz?verbose"); code != http.StatusServiceUnavailable || !strings.Contains(body, "the server is ending") {
		t.Errorf("readiness while ending: %d\n%s", code, body)
	}
	if err := c.ask(conn, workload, agent); err != nil {
		t.Errorf("a request while ending: %v", err)
	}
}

// TestOthersSecretEndsTheServer, with a hint; it does not wait for that to pass.
func TestOthersSecretEndsTheServer(t *testing.T) {
	c := newClusterSite(t, "local")
	c.api.Put(castellanSystem+"secrets/castellan-ca", &corev1.Secret{Type: corev1.SecretTypeOpaque, Data: map[string][]byte{"password": []byte("x")}})
	c.api.Start()
	err := start(t.Context(), []string{"-config", c.path("server.yaml")}, &log{})
	if err == nil || !strings.Contains(err.Error(), `holds a key "password" that this server does not write`) {
		t.Fatal(err)
	}
}

// TestSecretLostOverARestart is refused: the ledger knows of a root.
func TestSecretLostOverARestart(t *testing.T) {
	c := newClusterSite(t, "local")
	c.api.Start()
	stop, _ := c.start()
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	c.api.Delete(castellanSystem + "secrets/castellan-ca")
	c.api.Put(castellanSystem+"secrets/castellan-ca", &corev1.Secret{Type: corev1.SecretTypeOpaque})
	err := start(t.Context(), []string{"-config", c.path("server.yaml")}, &log{})
	if err == nil || !strings.Contains(err.Error(), "kubectl -n castellan-system annotate secret castellan-ca castellan.dev/new-root=true") {
		t.Fatal(err)
	}
}
