package cli_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	castellanv1 "castellan.dev/api/castellan/v1"
	"castellan.dev/internal/tlsconf/tlsconftest"
)

// agentAdmin is an agent with the certificates of its pods.
type agentAdmin struct {
	castellanv1.UnimplementedAgentAdminServer
	answer *castellanv1.CertificatesResponse
}

func (a *agentAdmin) Certificates(_ context.Context, req *castellanv1.CertificatesRequest) (*castellanv1.CertificatesResponse, error) {
	out := &castellanv1.CertificatesResponse{Node: a.answer.GetNode(), Roots: a.answer.GetRoots()}
	for _, w := range a.answer.GetWorkloads() {
		if req.GetPodUid() == "" || req.GetPodUid() == w.GetPodUid() {
			out.Workloads = append(out.Workloads, w)
		}
	}
	return out, nil
}

// podCluster has the pod shop/orders-1 on node-2, whose agent serves it a certificate.
func podCluster(t *testing.T) (c *fakeCluster, root *tlsconftest.CA, served *castellanv1.WorkloadCertificate) {
	t.Helper()
	c = newCluster(t)
	root = tlsconftest.NewRoot(t, inDomain("cluster.local"))
	served = &castellanv1.WorkloadCertificate{
		PodUid: "uid-orders-1", Namespace: "shop", ServiceAccount: "orders", PodName: "orders-1", Status: "valid",
		Chain: root.SVIDIssuer(t).Leaf(t, ordersID).Certificate, RenewsAt: timestamppb.New(time.Now().Add(time.Hour)),
	}
	agent := &agentAdmin{answer: &castellanv1.CertificatesResponse{Node: "node-2", Workloads: []*castellanv1.WorkloadCertificate{served}, Roots: [][]byte{root.Cert.Raw}}}
	c.admin("castellan-agent", "castellan-agent-b", "node-2", func(s *grpc.Server) { castellanv1.RegisterAgentAdminServer(s, agent) })
	c.set("/api/v1/namespaces/shop/pods/orders-1", runningPod("shop", "orders-1", "orders", "node-2"))
	c.publish(root.Cert)
	return c, root, served
}

func (c *fakeCluster) publish(roots ...*x509.Certificate) {
	c.set("/api/v1/namespaces/castellan-system/configmaps/castellan-bundle", corev1.ConfigMap{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "ConfigMap"}, Data: map[string]string{"bundle.pem": string(pemOf(roots...))},
	})
}

func TestInspectPod(t *testing.T) {
	t.Run("as it should be", func(t *testing.T) {
		c, _, _ := podCluster(t)
		r := c.run("cert", "inspect", "pod/orders-1").want(t, 0,
			"pod shop/orders-1 on node node-2, service account orders\n", "status      valid, renews at ",
			"verified    with the roots of ConfigMap castellan-system/castellan-bundle; it is the pod's own identity\n", ordersID+"\n", "└─ signed by ")
		if r.err != "" {
			t.Errorf("%s", r.err)
		}
		if want := "castellan-agent-b: /usr/bin/castellan-agent admin-stdio -config /etc/castellan/agent.yaml"; len(c.asked) != 1 || c.asked[0] != want {
			t.Errorf("ran %q, want %q", c.asked, want)
		}
		var got struct {
			Pod, Node, Status, Roots string
			RenewsAt                 time.Time
			Verification             struct {
				Valid    bool
				SPIFFEID string
			}
			Certificates []struct{ SPIFFEID string }
		}
		c.run("cert", "inspect", "pods/orders-1", "-n", "shop", "-o", "json").want(t, 0).decode(t, &got)
		if got.Pod != "orders-1" || got.Node != "node-2" || got.Status != "valid" || got.RenewsAt.IsZero() || !got.Verification.Valid || got.Verification.SPIFFEID != ordersID || len(got.Certificates) < 2 {
			t.Errorf("%+v", got)
		}
		c.run("cert", "inspect", "po/orders-1", "-o", "yaml").want(t, 0, "status: valid")
		if r := c.run("cert", "inspect", "pod/orders-1", "-o", "pem").want(t, 0); strings.Count(r.out, "BEGIN CERTIFICATE") < 2 || strings.Contains(r.out, "KEY") {
			t.Errorf("%s", r.out)
		}
		c.run("cert", "inspect", "pod/orders-1", "--expires-within", "1000d").want(t, 2, "renew it")
	})
	t.Run("of a deployment the pod that is ready", func(t *testing.T) {
		c, _, _ := podCluster(t)
		labels := map[string]string{"app": "orders"}
		c.set("/apis/apps/v1/namespaces/shop/deployments/orders", appsv1.Deployment{
			TypeMeta: metav1.TypeMeta{APIVersion: "apps/v1", Kind: "Deployment"}, Spec: appsv1.DeploymentSpec{Selector: &metav1.LabelSelector{MatchLabels: labels}},
		})
		pending := runningPod("shop", "orders-0", "orders", "")
		pending.Status.Conditions = nil
		c.set("/api/v1/namespaces/shop/pods?labelSelector=app%3Dorders", corev1.PodList{
			TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "PodList"}, Items: []corev1.Pod{pending, runningPod("shop", "orders-1", "orders", "node-2")},
		})
		c.run("cert", "inspect", "deploy/orders").want(t, 0, "pod shop/orders-1 on node node-2")
	})
	// Whoever calls the pod would refuse these.
	tests := map[string]struct {
		breakIt func(t *testing.T, c *fakeCluster, root *tlsconftest.CA, served *castellanv1.WorkloadCertificate)
		want    []string
	}{
		"refused": {func(_ *testing.T, _ *fakeCluster, _ *tlsconftest.CA, w *castellanv1.WorkloadCertificate) {
			w.Chain, w.Status, w.Problem = nil, "refused", "denied"
		}, []string{"status      refused, last failure: denied", "NOT VALID   no certificate: the agent has none for this pod (refused)", "hint: read the agent's and the server's log: denied"}},
		"refused, with the last one": {func(_ *testing.T, _ *fakeCluster, _ *tlsconftest.CA, w *castellanv1.WorkloadCertificate) {
			w.Status, w.Problem = "refused", "denied"
		}, []string{"status      refused, last failure: denied", "verified "}},
		"expired": {func(t *testing.T, _ *fakeCluster, root *tlsconftest.CA, w *castellanv1.WorkloadCertificate) {
			w.Status = "expired"
			w.Chain = root.SVIDIssuer(t).Leaf(t, ordersID, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }).Certificate
		}, []string{"NOT VALID   expired: ", "EXPIRED"}},
		"of another account": {func(t *testing.T, _ *fakeCluster, root *tlsconftest.CA, w *castellanv1.WorkloadCertificate) {
			w.Chain = root.SVIDIssuer(t).Leaf(t, frontendID).Certificate
		}, []string{"NOT VALID   wrong SPIFFE ID: ", frontendID}},
		"of another root": {func(t *testing.T, c *fakeCluster, _ *tlsconftest.CA, _ *castellanv1.WorkloadCertificate) {
			c.publish(tlsconftest.NewRoot(t, inDomain("cluster.local")).Cert)
		}, []string{"NOT VALID   unknown authority: "}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			c, root, served := podCluster(t)
			tt.breakIt(t, c, root, served)
			c.run("cert", "inspect", "pod/orders-1").want(t, 2, tt.want...)
			dir := t.TempDir()
			c.run("cert", "fetch", "pod/orders-1", "--out", filepath.Join(dir, "x")).want(t, 2, tt.want...)
			if _, err := os.Stat(filepath.Join(dir, "x")); err == nil {
				t.Error("written all the same")
			}
		})
	}
	t.Run("roots that may not be read", func(t *testing.T) {
		c, _, _ := podCluster(t)
		c.forbid("/api/v1/namespaces/castellan-system/configmaps/castellan-bundle")
		c.run("cert", "inspect", "pod/orders-1").want(t, 0, "verified with the roots that the agent itself has: ", "this needs the verb get on configmaps in namespace castellan-system", "verified    with the roots of the agent;")
	})
	t.Run("cannot be told", func(t *testing.T) {
		c, _, served := podCluster(t)
		c.run("cert", "inspect", "pod/nosuch").want(t, 3, "not found in namespace shop")
		c.run("cert", "inspect", "deploy/nosuch", "-n", "other").want(t, 3, "not found in namespace other")
		c.run("cert", "inspect", "pod/orders-1", "--server-name", "x").want(t, 3, "--client-cert, --client-key and --server-name are for HOST:PORT")
		c.run("cert", "inspect", "svid.pem", "-n", "shop").want(t, 3, "flags of a cluster are for pod/NAME")
		served.PodUid = "somebody else's"
		c.run("cert", "inspect", "pod/orders-1").want(t, 1, "the agent on node node-2 serves nothing to pod shop/orders-1", "was its namespace labelled for injection")
		c.set("/api/v1/namespaces/shop/pods/orders-1", runningPod("shop", "orders-1", "orders", ""))
		c.run("cert", "inspect", "pod/orders-1").want(t, 1, "pod shop/orders-1 is on no node yet")
		c.set("/api/v1/namespaces/shop/pods/orders-1", runningPod("shop", "orders-1", "orders", "node-1"))
		c.run("cert", "inspect", "pod/orders-1").want(t, 1, "castellan-agent")
		c.forbid("/api/v1/namespaces/shop/pods/orders-1")
		c.run("cert", "inspect", "pod/orders-1").want(t, 1, "this needs the verb get on pods in namespace shop")
	})
}

// A pod's chain and roots can be had, its key cannot.
func TestFetchPod(t *testing.T) {
	c, root, served := podCluster(t)
	dir := filepath.Join(t.TempDir(), "orders")
	c.run("cert", "fetch", "pod/orders-1", "--out", dir).want(t, 0, "svid.pem, bundle.pem of pod shop/orders-1 ("+ordersID, "its key stays where it is")
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 2 {
		t.Fatalf("%v %v", entries, err)
	}
	want := pemOf(tlsconftest.Chain(t, &tls.Certificate{Certificate: served.GetChain()})...)
	if got := readFile(t, filepath.Join(dir, "svid.pem")) + "\n"; got != string(want) {
		t.Errorf("%s", got)
	}
	if got := readFile(t, filepath.Join(dir, "bundle.pem")) + "\n"; got != string(pemOf(root.Cert)) {
		t.Errorf("%s", got)
	}
	c.run("cert", "fetch", "pod/orders-1").want(t, 0, "pod shop/orders-1 on node node-2")
	c.run("cert", "fetch", "pod/orders-1", "--watch").want(t, 3, "without --socket and --watch")
	c.run("cert", "fetch", "pod/orders-1", "--out", writeFile(t, "file", nil)).want(t, 1, "--out: ")
	c.run("cert", "fetch", "--socket", "/x", "-n", "shop").want(t, 3, "flags of a cluster are for pod/NAME")
}
