package e2e_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	securityv1alpha1 "istio.io/api/security/v1alpha1"

	"castellan.dev/internal/jws/jwstest"
	"castellan.dev/internal/up"
)

// site is a server's directory with everything it needs, and an issuer of
// workload tokens whose key the test holds.
type site struct {
	t          *testing.T
	dir        string
	data       string // the server's data directory
	issuer     *jwstest.Issuer
	grpc, http string
	server     *process
}

const siteIssuer = "https://workloads.test"

// Pods of a site's workloads file.
var (
	podOrders = jwstest.Pod{Namespace: "shop", Account: "orders", AccountUID: "sa-orders", Name: "orders-1", UID: "pod-orders", Node: "node-a", NodeUID: "uid-a"}
	podOther  = jwstest.Pod{Namespace: "shop", Account: "other", AccountUID: "sa-other", Name: "other-1", UID: "pod-other", Node: "node-a", NodeUID: "uid-a"}
	podAgent  = jwstest.Pod{Namespace: "castellan-system", Account: "castellan-agent", AccountUID: "sa-agent", Name: "agent-a", UID: "pod-agent", Node: "node-a", NodeUID: "uid-a"}
	podAgentB = jwstest.Pod{Namespace: "castellan-system", Account: "castellan-agent", AccountUID: "sa-agent", Name: "agent-b", UID: "pod-agent-b", Node: "node-b", NodeUID: "uid-b"}
)

// newSite writes the files; more is added to the server's configuration.
func newSite(t *testing.T, more string) *site {
	t.Helper()
	dir := shortDir(t)
	s := &site{
		t: t, dir: dir, data: filepath.Join(dir, "data"), grpc: ownPort(t), http: ownPort(t),
		issuer: jwstest.RSA(t, siteIssuer, "k1"),
	}
	s.write("keys.json", string(jwstest.JWKS(t, s.issuer)))
	text := "apiVersion: castellan.dev/v1alpha1\nkind: Workloads\nworkloads:\n"
	for _, p := range []jwstest.Pod{podOrders, podOther} {
		text += fmt.Sprintf("- {namespace: %s, serviceAccount: %s, podUID: %s, podName: %s, serviceAccountUID: %s, node: %s}\n", p.Namespace, p.Account, p.UID, p.Name, p.AccountUID, p.Node)
	}
	s.write("workloads.yaml", text)
	if err := os.Mkdir(s.path("policy"), 0o700); err != nil {
		t.Fatal(err)
	}
	s.write("server.yaml", s.config(more))
	// What the commands need of an up.json.
	out, err := json.Marshal(up.File{TrustDomain: "cluster.local", Server: up.Server{GRPC: s.grpc, HTTP: s.http, Admin: filepath.Join(s.data, "admin.sock")}})
	if err != nil {
		t.Fatal(err)
	}
	s.write("up.json", string(out))
	return s
}

func (s *site) config(more string) string {
	return fmt.Sprintf(`apiVersion: castellan.dev/v1alpha1
kind: ServerConfig
dataDir: %[2]s
listen: %[3]s
http: %[4]s
bundleFile: %[1]s/bundle.pem
attestation:
  issuers: [{issuer: %[5]q, jwksFile: %[1]s/keys.json}]
  workloadsFile: %[1]s/workloads.yaml
discovery: {policyDir: %[1]s/policy}
%[6]s
`, s.dir, s.data, s.grpc, s.http, siteIssuer, more)
}

func (s *site) path(name string) string        { return filepath.Join(s.dir, name) }
func (s *site) write(name, text string) string { return writeTo(s.t, s.path(name), text) }

// launch starts the server without waiting for anything.
func (s *site) launch() *process {
	s.t.Helper()
	s.server = launch(s.t, "castellan-server", s.path("server.yaml"))
	return s.server
}

// start starts the server and waits until it is ready.
func (s *site) start() *site {
	s.t.Helper()
	p := s.launch()
	eventually(s.t, "the server is ready", func() error {
		if !p.alive() {
			s.t.Fatalf("castellan-server ended: %s", p.err)
		}
		return ready(s.http)
	})
	return s
}

func (s *site) token(p jwstest.Pod) string {
	return s.issuer.PodToken(s.t, time.Now(), p, "castellan.dev")
}

func (s *site) roots() *x509.CertPool {
	s.t.Helper()
	data, err := os.ReadFile(s.path("bundle.pem"))
	if err != nil {
		s.t.Fatal(err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(data) {
		s.t.Fatal("no roots")
	}
	return pool
}

// client is a connection to the issuing service.
func (s *site) client() securityv1alpha1.IstioCertificateServiceClient {
	s.t.Helper()
	conn, err := grpc.NewClient(s.grpc, grpc.WithNoProxy(), grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{RootCAs: s.roots(), MinVersion: tls.VersionTLS13})))
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { conn.Close() })
	return securityv1alpha1.NewIstioCertificateServiceClient(conn)
}

// newKey makes a key; ecdsa.GenerateKey refuses none of the curves here.
func newKey(t *testing.T, curve elliptic.Curve) crypto.Signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func csrDER(t *testing.T, key crypto.Signer, template x509.CertificateRequest) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &template, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func csrPEM(der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))
}

func newCSR(t *testing.T) string {
	t.Helper()
	return csrPEM(csrDER(t, newKey(t, elliptic.P256()), x509.CertificateRequest{}))
}

// request asks for one certificate, with a deadline of its own.
func request(client securityv1alpha1.IstioCertificateServiceClient, workload, agent, csr string) (*x509.Certificate, []string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	md := metadata.MD{}
	if workload != "" {
		md.Set("authorization", "Bearer "+workload)
	}
	if agent != "" {
		md.Set("castellan-agent-token", agent)
	}
	resp, err := client.CreateCertificate(metadata.NewOutgoingContext(ctx, md), &securityv1alpha1.IstioCertificateRequest{Csr: csr})
	if err != nil {
		return nil, nil, err
	}
	block, _ := pem.Decode([]byte(resp.GetCertChain()[0]))
	if block == nil {
		return nil, nil, fmt.Errorf("no certificate in %q", resp.GetCertChain())
	}
	leaf, err := x509.ParseCertificate(block.Bytes)
	return leaf, resp.GetCertChain(), err
}

// mustIssue asks for one certificate of shop/orders and checks it against the roots.
func (s *site) mustIssue(client securityv1alpha1.IstioCertificateServiceClient) (*x509.Certificate, []string) {
	s.t.Helper()
	leaf, chain, err := request(client, s.token(podOrders), s.token(podAgent), newCSR(s.t))
	if err != nil {
		s.t.Fatal(err)
	}
	s.verify(leaf, chain)
	return leaf, chain
}

func (s *site) verify(leaf *x509.Certificate, chain []string) {
	s.t.Helper()
	above := x509.NewCertPool()
	for _, c := range chain[1:] {
		above.AppendCertsFromPEM([]byte(c))
	}
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: s.roots(), Intermediates: above, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
		s.t.Error(err)
	}
}

// issuedRow is a row of `castellan ca issued -o json`.
type issuedRow struct {
	Serial, SPIFFEID, Outcome, PodUID, Node, LeafSHA256 string
	NotAfter                                            time.Time
}

// issued asks the ledger through the command, by serial.
func issued(t *testing.T, upFile string) map[string]issuedRow {
	t.Helper()
	r := castellan(t, "ca", "issued", "--up", upFile, "-o", "json").want(t, 0)
	rows := map[string]issuedRow{}
	for _, row := range decodeJSON[[]issuedRow](t, r.out) {
		if _, twice := rows[row.Serial]; twice {
			t.Errorf("serial %s stands twice in the ledger", row.Serial)
		}
		rows[row.Serial] = row
	}
	return rows
}

func serialOf(n *big.Int) string { return n.Text(16) }
