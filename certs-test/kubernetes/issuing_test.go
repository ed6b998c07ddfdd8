package kubernetes_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"slices"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"
	istioca "istio.io/api/security/v1alpha1"
)

const serverName = "castellan-server.castellan-system.svc"

// roots are what castellan-bundle publishes.
func roots() (*x509.CertPool, error) {
	var m struct{ Data map[string]string }
	if err := api.get("/api/v1/namespaces/castellan-system/configmaps/castellan-bundle", &m); err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM([]byte(m.Data["bundle.pem"])) {
		return nil, errors.New("the bundle holds no certificate")
	}
	return pool, nil
}

// dialServer connects to the server's gRPC port from a node, with a client's
// certificate if there is one.
func dialServer(t testing.TB, cert *tls.Certificate) *grpc.ClientConn {
	t.Helper()
	pool, err := roots()
	if err != nil {
		t.Fatal(err)
	}
	cfg := &tls.Config{RootCAs: pool, ServerName: serverName, MinVersion: tls.VersionTLS13}
	if cert != nil {
		cfg.Certificates = []tls.Certificate{*cert}
	}
	node, err := shared.Node("node-1")
	if err != nil {
		t.Fatal(err)
	}
	conn, err := grpc.NewClient("passthrough:"+net.JoinHostPort(serviceIP(t, "castellan-system", "castellan-server"), "15012"),
		grpc.WithTransportCredentials(credentials.NewTLS(cfg)), grpc.WithNoProxy(),
		grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) { return dialFrom(node)(ctx, "tcp", addr) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func serviceIP(t testing.TB, ns, name string) string {
	t.Helper()
	var s struct{ Spec struct{ ClusterIP string } }
	if err := api.get("/api/v1/namespaces/"+ns+"/services/"+name, &s); err != nil {
		t.Fatal(err)
	}
	return s.Spec.ClusterIP
}

// podToken is a token for a pod, as its kubelet has it: bound to the pod, and by that
// to its node.
func podToken(t testing.TB, ns, account, pod, uid, audience string) string {
	t.Helper()
	token, err := requestToken(ns, account, pod, uid, audience)
	if err != nil {
		t.Fatal(err)
	}
	return token
}

func requestToken(ns, account, pod, uid, audience string) (string, error) {
	var answer struct{ Status struct{ Token string } }
	spec := object{"audiences": []string{audience}, "expirationSeconds": 3600}
	if pod != "" {
		spec["boundObjectRef"] = object{"apiVersion": "v1", "kind": "Pod", "name": pod, "uid": uid}
	}
	err := api.post("/api/v1/namespaces/"+ns+"/serviceaccounts/"+account+"/token",
		object{"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}, &answer)
	return answer.Status.Token, err
}

func (a *app) token(t testing.TB) string {
	t.Helper()
	return podToken(t, a.Namespace, a.Account, a.Name, a.UID, "castellan.dev")
}

// agentOf is the agent's pod on a node.
func agentOf(t testing.TB, node string) *app {
	t.Helper()
	var found *app
	eventually(t, "an agent on "+node, func() error {
		for _, p := range agents(t) {
			if p.Spec.NodeName == node && p.Metadata.DeletionTimestamp == nil {
				found = p.app("castellan-system")
				return nil
			}
		}
		return errors.New("there is none")
	})
	return found
}

func agents(t testing.TB) []podStatus {
	t.Helper()
	return listPods(t, "castellan-system", "app%3Dcastellan-agent")
}

func listPods(t testing.TB, ns, selector string) []podStatus {
	t.Helper()
	var list struct{ Items []podStatus }
	if err := api.get("/api/v1/namespaces/"+ns+"/pods?labelSelector="+selector, &list); err != nil {
		t.Fatal(err)
	}
	return list.Items
}

// request is one request for a certificate.
type request struct {
	token, agentToken string
	// id is asked for in the CSR, if it is not empty; impersonates as ztunnel does.
	id, impersonates string
}

// issue asks for a certificate, and returns the leaf with its key.
func issue(t *testing.T, conn *grpc.ClientConn, r request) (*tls.Certificate, error) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.CertificateRequest{}
	if r.id != "" {
		u, err := url.Parse(r.id)
		if err != nil {
			t.Fatal(err)
		}
		template.URIs = []*url.URL{u}
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+r.token, "clusterid", "Kubernetes")
	if r.agentToken != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "castellan-agent-token", r.agentToken)
	}
	asks := &istioca.IstioCertificateRequest{
		Csr: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: csr})),
	}
	if r.impersonates != "" {
		if asks.Metadata, err = structpb.NewStruct(map[string]any{"ImpersonatedIdentity": r.impersonates}); err != nil {
			t.Fatal(err)
		}
	}
	answer, err := istioca.NewIstioCertificateServiceClient(conn).CreateCertificate(ctx, asks)
	if err != nil {
		return nil, err
	}
	made := &tls.Certificate{PrivateKey: key}
	for _, text := range answer.GetCertChain() {
		for block, rest := pem.Decode([]byte(text)); block != nil; block, rest = pem.Decode(rest) {
			made.Certificate = append(made.Certificate, block.Bytes)
		}
	}
	if len(made.Certificate) == 0 {
		t.Fatal("a chain of nothing")
	}
	made.Leaf, err = x509.ParseCertificate(made.Certificate[0])
	return made, err
}

// issues asks until it is answered: a pod that was just made may be news to the server.
func issues(t *testing.T, conn *grpc.ClientConn, r request) *tls.Certificate {
	t.Helper()
	var cert *tls.Certificate
	eventually(t, "a certificate", func() (err error) {
		cert, err = issue(t, conn, r)
		return err
	})
	return cert
}

// refuses fails the test unless the answer is a refusal, not a failure.
func refuses(t *testing.T, what string, err error) {
	t.Helper()
	if !isRefusal(err) {
		t.Errorf("%s: got %v, want a refusal", what, err)
	}
}

func isRefusal(err error) bool {
	return slices.Contains([]codes.Code{codes.Unauthenticated, codes.PermissionDenied, codes.InvalidArgument}, status.Code(err))
}

// neverIssues asks until it is refused; a failure is neither, and a certificate is one
// too many.
func neverIssues(t *testing.T, conn *grpc.ClientConn, what string, r request) {
	t.Helper()
	eventually(t, what+" is refused", func() error {
		_, err := issue(t, conn, r)
		if err == nil {
			t.Fatalf("%s: a certificate", what)
		}
		if !isRefusal(err) {
			return err
		}
		return nil
	})
}

// Promises: a pod's token gives its own identity and no other; one that is stolen to
// the other node is refused, and so is one without an agent.
func TestTokensAreWorthTheirOwnPodOnItsNode(t *testing.T) {
	t.Parallel()
	verdicts(t)
}

// verdicts on tokens are the same in both ways of verifying them.
func verdicts(t *testing.T) {
	t.Helper()
	from := site(t)
	conn := dialServer(t, nil)
	here := agentOf(t, from.web.Node).token(t)
	there := agentOf(t, from.far.Node).token(t)
	own := request{token: from.web.token(t), agentToken: here}

	leaf := issues(t, conn, own).Leaf
	if len(leaf.URIs) != 1 || leaf.URIs[0].String() != from.web.id() {
		t.Errorf("the certificate is for %v, want %s", leaf.URIs, from.web.id())
	}
	own.id = from.web.id()
	issues(t, conn, own)

	for what, r := range map[string]request{
		"stolen to the other node":        {token: own.token, agentToken: there},
		"without an agent":                {token: own.token},
		"with itself as the agent's":      {token: own.token, agentToken: own.token},
		"for another account's name":      {token: own.token, agentToken: here, id: from.other.id()},
		"for a name beside its own":       {token: own.token, agentToken: here, id: from.web.id() + "/x"},
		"for another trust domain":        {token: own.token, agentToken: here, id: "spiffe://example.org/ns/callers/sa/web"},
		"for the audience of the cluster": {token: podToken(t, "callers", "web", "web", from.web.UID, "https://kubernetes.default.svc.cluster.local"), agentToken: here},
		"bound to no pod":                 {token: podToken(t, "callers", "web", "", "", "castellan.dev"), agentToken: here},
		"whose signature is changed":      {token: own.token[:len(own.token)-8] + "AAAAAAAA", agentToken: here},
	} {
		neverIssues(t, conn, "a token "+what, r)
	}
}

// Promise: a deleted pod's token is refused once its object is gone.
func TestDeletedPodsTokenIsRefused(t *testing.T) {
	t.Parallel()
	needCluster(t)
	deletedPod(t, "deleted")
}

func deletedPod(t *testing.T, ns string) {
	t.Helper()
	namespace(t, ns)
	gone := one(t, ns, pod{Name: "gone", Node: "node-2"})
	conn := dialServer(t, nil)
	r := request{token: gone.token(t), agentToken: agentOf(t, "node-2").token(t)}
	issues(t, conn, r)
	deletePod(t, ns, "gone")
	eventually(t, "the token is refused", func() error {
		_, err := issue(t, conn, r)
		switch status.Code(err) {
		case codes.Unauthenticated, codes.PermissionDenied:
			return nil
		}
		return fmt.Errorf("got %w", err)
	})
	// Another pod of the same name is another pod.
	again := one(t, ns, pod{Name: "gone", Node: "node-2"})
	neverIssues(t, conn, "the token of the pod before", r)
	r.token = again.token(t)
	issues(t, conn, r)
}

// Promise: a pod of an account that was deleted and made anew is not the account's.
func TestAccountsAreToldApartByUID(t *testing.T) {
	t.Parallel()
	needCluster(t)
	const ns = "reborn"
	namespace(t, ns)
	a := one(t, ns, pod{Name: "a", Node: "node-1"})
	conn := dialServer(t, nil)
	r := request{token: a.token(t), agentToken: agentOf(t, "node-1").token(t)}
	issues(t, conn, r)
	if err := api.remove("/api/v1/namespaces/" + ns + "/serviceaccounts/a"); err != nil && !isStatus(err, http.StatusNotFound) {
		t.Fatal(err)
	}
	if err := account(ns, "a"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the token is refused", func() error {
		_, err := issue(t, conn, r)
		switch status.Code(err) {
		case codes.Unauthenticated, codes.PermissionDenied:
			return nil
		}
		return fmt.Errorf("got %w", err)
	})
}
