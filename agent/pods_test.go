package agent_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"castellan.dev/agent/agenttest"
	"castellan.dev/agent/csi/csitest"
	castellanv1 "castellan.dev/api/castellan/v1"
	"castellan.dev/internal/config"
	"castellan.dev/sds"
)

// kube is an agent on a node of Kubernetes, with its kubelet.
type kube struct {
	*node
	kubelet *csitest.Kubelet
}

func startKube(t *testing.T, s *agenttest.Server) *kube {
	t.Helper()
	dir, err := os.MkdirTemp("", "k")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	cfg := configure(t, s)
	cfg.CSI = &config.AgentCSI{KubeletDir: filepath.Join(dir, "kubelet"), StateDir: filepath.Join(dir, "state")}
	cfg.AdminSocket = filepath.Join(dir, "admin.sock")
	if err := cfg.Validate(); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(cfg.CSI.KubeletDir, "plugins_registry"), 0o750); err != nil {
		t.Fatal(err)
	}
	k := &kube{kubelet: &csitest.Kubelet{Dir: cfg.CSI.KubeletDir}}
	k.begin(t, s, cfg)
	return k
}

func (k *kube) begin(t *testing.T, s *agenttest.Server, cfg config.Agent) {
	t.Helper()
	k.node = start(t, s, cfg)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := k.kubelet.Register(ctx); err != nil {
		t.Fatal(err)
	}
}

func podOf(sa, uid string) csitest.Pod {
	return csitest.Pod{Namespace: "shop", ServiceAccount: sa, Name: sa + "-0", UID: uid}
}

func (k *kube) publish(p csitest.Pod) {
	k.t.Helper()
	if err := k.kubelet.Publish(k.t.Context(), p, agenttest.Token(p.Namespace+"/"+p.ServiceAccount, p.UID)); err != nil {
		k.t.Fatal(err)
	}
}

func (k *kube) unpublish(p csitest.Pod) {
	k.t.Helper()
	if err := k.kubelet.Unpublish(k.t.Context(), p); err != nil {
		k.t.Fatal(err)
	}
}

// conn opens a connection from inside of a pod.
func (k *kube) conn(p csitest.Pod) *grpc.ClientConn {
	k.t.Helper()
	conn, err := k.kubelet.Conn(p)
	if err != nil {
		k.t.Fatal(err)
	}
	k.t.Cleanup(func() { conn.Close() })
	return conn
}

// identity waits for the pod's certificate and returns whom it names.
func (k *kube) identity(p csitest.Pod) string {
	k.t.Helper()
	ctx, cancel := context.WithTimeout(k.t.Context(), 20*time.Second)
	defer cancel()
	id, err := csitest.Certificate(ctx, k.conn(p))
	if err != nil {
		k.t.Fatal(err)
	}
	return id
}

func (k *kube) certificates(uid string) *castellanv1.CertificatesResponse {
	k.t.Helper()
	conn, err := grpc.NewClient("unix:"+k.cfg.AdminSocket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		k.t.Fatal(err)
	}
	defer conn.Close()
	resp, err := castellanv1.NewAgentAdminClient(conn).Certificates(k.t.Context(), &castellanv1.CertificatesRequest{PodUid: uid}, grpc.WaitForReady(true))
	if err != nil {
		k.t.Fatal(err)
	}
	return resp
}

func TestPodsGetTheirOwnIdentity(t *testing.T) {
	s := agenttest.New(t)
	k := startKube(t, s)
	orders, billing := podOf("orders", "uid-1"), podOf("billing", "uid-2")
	k.publish(orders)
	k.publish(billing)
	for p, want := range map[csitest.Pod]string{orders: "shop/orders", billing: "shop/billing"} {
		if got := k.identity(p); got != agenttest.ID(want) {
			t.Errorf("pod of %s is served %s", want, got)
		}
	}
	k.ready()
	for name, notice := range k.agent.Notices() {
		eventually(t, notice)
		if name != "workloads" {
			t.Errorf("notice %q", name)
		}
	}
	eventually(t, func() error {
		if got := k.metric("castellan_agent_first_certificate_seconds", ""); got != 2 {
			return fmt.Errorf("first certificates of %v pods", got)
		}
		return nil
	})
	if got := k.metric("castellan_agent_volumes", ""); got != 2 {
		t.Errorf("%v volumes", got)
	}

	all := k.certificates("")
	if all.GetNode() != "local" || len(all.GetWorkloads()) != 2 || len(all.GetRoots()) == 0 {
		t.Fatalf("admin: %v", all)
	}
	one := k.certificates("uid-1").GetWorkloads()
	if len(one) != 1 || one[0].GetPodName() != "orders-0" || one[0].GetNamespace() != "shop" || one[0].GetServiceAccount() != "orders" ||
		one[0].GetStatus() != "valid" || len(one[0].GetChain()) < 2 || one[0].GetProblem() != "" || !one[0].GetRenewsAt().AsTime().After(time.Now()) {
		t.Errorf("admin, one pod: %v", one)
	}
	if none := k.certificates("uid-3").GetWorkloads(); len(none) != 0 {
		t.Errorf("admin, no pod: %v", none)
	}
	if info, err := os.Lstat(k.cfg.AdminSocket); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("admin socket: %v %v", info, err)
	}
	for _, secret := range []string{"PRIVATE KEY", agenttest.Token("shop/orders", "uid-1")[:60]} {
		if strings.Contains(k.logs.String(), secret) {
			t.Errorf("log holds a secret (%s)", secret[:10])
		}
	}
}

// TestTwoVolumesOfAPod are two sockets of one identity, which ends with the last.
func TestTwoVolumesOfAPod(t *testing.T) {
	s := agenttest.New(t)
	k := startKube(t, s)
	first := podOf("orders", "uid-1")
	second := first
	second.Volume = "proxy"
	k.publish(first)
	k.publish(second)
	if a, b := k.identity(first), k.identity(second); a != b || a != agenttest.ID("shop/orders") {
		t.Errorf("%q and %q", a, b)
	}
	if got := k.certificates("").GetWorkloads(); len(got) != 1 {
		t.Errorf("%d identities", len(got))
	}
	asked := 0
	for _, r := range s.Requests() {
		if r.Account == "shop/orders" {
			asked++
		}
	}
	if asked != 1 {
		t.Errorf("%d certificates asked for", asked)
	}
	k.unpublish(first)
	if got := k.identity(second); got != agenttest.ID("shop/orders") {
		t.Errorf("the other volume serves %q", got)
	}
	k.unpublish(second)
	if got := k.certificates("").GetWorkloads(); len(got) != 0 {
		t.Errorf("%d identities after the end of the pod", len(got))
	}
}

// TestUnpublishEndsStreams of every API, and the pod's part of the report.
func TestUnpublishEndsStreams(t *testing.T) {
	s := agenttest.New(t)
	k := startKube(t, s)
	p, other := podOf("orders", "uid-1"), podOf("billing", "uid-2")
	k.publish(p)
	k.publish(other)
	k.identity(p)
	k.identity(other)
	conn := k.conn(p)
	api, err := workload.NewSpiffeWorkloadAPIClient(conn).FetchX509SVID(withHeader(t.Context()), &workload.X509SVIDRequest{})
	if err != nil {
		t.Fatal(err)
	}
	secrets, err := secretv3.NewSecretDiscoveryServiceClient(conn).StreamSecrets(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := secrets.Send(&discoveryv3.DiscoveryRequest{TypeUrl: sds.TypeSecret, ResourceNames: []string{sds.NameDefault}}); err != nil {
		t.Fatal(err)
	}
	if _, err := api.Recv(); err != nil {
		t.Fatal(err)
	}
	if _, err := secrets.Recv(); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	k.unpublish(p)
	if took := time.Since(begin); took > 2*time.Second {
		t.Errorf("unpublishing took %s", took)
	}
	if _, err := api.Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("workload API stream: %v", err)
	}
	if _, err := secrets.Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("SDS stream: %v", err)
	}
	if got := k.identity(other); got != agenttest.ID("shop/billing") {
		t.Errorf("the other pod is served %q", got)
	}
	eventually(t, func() error {
		reports := s.Reports()
		if len(reports) == 0 {
			return errors.New("no report")
		}
		for _, w := range reports[len(reports)-1].GetWorkloads() {
			if w.GetPodUid() == "uid-1" {
				return errors.New("the pod is still reported")
			}
		}
		return nil
	})
}

// TestPodDeletedWhileItsCertificateIsMade: the call is cancelled, and nobody waits for it.
func TestPodDeletedWhileItsCertificateIsMade(t *testing.T) {
	s := agenttest.New(t)
	began, ended := make(chan struct{}), make(chan error, 1)
	s.Set(func(k *agenttest.Knobs) {
		k.Before = func(ctx context.Context, account string) error {
			if account != "shop/orders" {
				return nil
			}
			close(began)
			<-ctx.Done()
			ended <- ctx.Err()
			return ctx.Err()
		}
	})
	k := startKube(t, s)
	p := podOf("orders", "uid-1")
	k.publish(p) // returns although the server hangs
	<-began
	begin := time.Now()
	k.unpublish(p)
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("the server's call ended with %v", err)
	}
	if took := time.Since(begin); took > 5*time.Second {
		t.Errorf("it took %s", took)
	}
	if got := k.certificates("").GetWorkloads(); len(got) != 0 {
		t.Errorf("%v", got)
	}
}

// TestOnePodDoesNotTakeTheNode: what the server refuses one pod is a notice.
func TestOnePodDoesNotTakeTheNode(t *testing.T) {
	s := agenttest.New(t)
	s.Set(func(k *agenttest.Knobs) {
		k.Before = func(_ context.Context, account string) error {
			if account == "shop/orders" {
				return status.Error(codes.Unauthenticated, "stale")
			}
			return nil
		}
	})
	k := startKube(t, s)
	k.publish(podOf("orders", "uid-1"))
	eventually(t, func() error {
		if err := k.agent.Notices()["workloads"](); err == nil || err.Error() != "shop/orders: certificate starting, last attempt: unauthenticated" {
			return fmt.Errorf("notice: %w", errors.Join(err, errors.New("unexpected")))
		}
		return nil
	})
	k.ready()
	if _, ok := k.agent.Checks()["workloads"]; ok {
		t.Error("the pods are a readiness check")
	}
	got := k.certificates("uid-1").GetWorkloads()
	if len(got) != 1 || got[0].GetStatus() != "starting" || got[0].GetProblem() != "unauthenticated" || len(got[0].GetChain()) != 0 {
		t.Errorf("admin: %v", got)
	}
}

// TestAgentReplacedUnderPods: the next agent serves the same pods, without the
// kubelet's saying so, and with keys of its own.
func TestAgentReplacedUnderPods(t *testing.T) {
	s := agenttest.New(t)
	k := startKube(t, s)
	p := podOf("orders", "uid-1")
	k.publish(p)
	k.identity(p)
	before := k.certificates("uid-1").GetWorkloads()[0].GetChain()[0]
	conn := k.conn(p) // lives through it, as a pod's does
	if err := k.stop(); err != nil {
		t.Fatal(err)
	}
	k.begin(t, s, k.cfg)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	id, err := csitest.Certificate(ctx, conn)
	if err != nil || id != agenttest.ID("shop/orders") {
		t.Fatalf("%q %v", id, err)
	}
	if after := k.certificates("uid-1").GetWorkloads()[0].GetChain()[0]; string(after) == string(before) {
		t.Error("the certificate is the old one: its key was kept")
	}
	found, err := filepath.Glob(filepath.Join(k.cfg.CSI.StateDir, "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range found {
		data, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(data), "PRIVATE") || strings.Contains(string(data), "key") {
			t.Errorf("%s: %s", f, data)
		}
	}
}
