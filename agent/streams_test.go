package agent_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"castellan.dev/agent/agenttest"
	"castellan.dev/agent/upstream"
	castellanv1 "castellan.dev/api/castellan/v1"
	"castellan.dev/internal/xds"
	"castellan.dev/sds"
)

// delta is a client of any delta stream.
type delta interface {
	Send(*discoveryv3.DeltaDiscoveryRequest) error
	Recv() (*discoveryv3.DeltaDiscoveryResponse, error)
}

// ask sends a request and fails the test if it cannot.
func ask(t *testing.T, s delta, r *discoveryv3.DeltaDiscoveryRequest) {
	t.Helper()
	if err := s.Send(r); err != nil {
		t.Fatal(err)
	}
}

func answer(t *testing.T, s delta) *discoveryv3.DeltaDiscoveryResponse {
	t.Helper()
	m, err := s.Recv()
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func secret(t *testing.T, m *discoveryv3.DeltaDiscoveryResponse, name string) *tlsv3.Secret {
	t.Helper()
	for _, r := range m.GetResources() {
		if r.GetName() != name {
			continue
		}
		out := &tlsv3.Secret{}
		if err := r.GetResource().UnmarshalTo(out); err != nil {
			t.Fatal(err)
		}
		return out
	}
	t.Fatalf("no %q in %v", name, m.GetResources())
	return nil
}

func TestSDSIsPushedAndReported(t *testing.T) {
	s := agenttest.New(t)
	s.Set(func(k *agenttest.Knobs) { k.TTL = 3 * time.Second })
	n := start(t, s, configure(t, s, account))
	n.ready()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	stream, err := secretv3.NewSecretDiscoveryServiceClient(n.dial(0)).DeltaSecrets(ctx)
	if err != nil {
		t.Fatal(err)
	}
	ask(t, stream, &discoveryv3.DeltaDiscoveryRequest{
		Node: &corev3.Node{Id: "envoy-1"}, TypeUrl: sds.TypeSecret, ResourceNamesSubscribe: []string{sds.NameDefault, sds.NameRoot},
	})
	seen := map[string]bool{}
	var last string
	for len(seen) < 3 {
		m := answer(t, stream)
		for _, r := range m.GetResources() {
			if r.GetName() == sds.NameDefault {
				last = r.GetVersion()
				seen[string(secret(t, m, sds.NameDefault).GetTlsCertificate().GetCertificateChain().GetInlineBytes())] = true
			}
		}
		ask(t, stream, &discoveryv3.DeltaDiscoveryRequest{TypeUrl: sds.TypeSecret, ResponseNonce: m.GetNonce()})
	}
	acked := time.Now()
	eventually(t, func() error {
		for _, r := range s.Reports() {
			for _, w := range r.GetWorkloads() {
				for _, st := range w.GetStreams() {
					for _, res := range st.GetResources() {
						if st.GetClient() == "sds:envoy-1" && res.GetName() == sds.NameDefault && res.GetAcked() == last && w.GetPodUid() == "uid-orders" && w.GetSerial() != "" {
							return nil
						}
					}
				}
			}
		}
		return fmt.Errorf("version %s was not reported", last)
	})
	// A second is what is promised; a busy machine is no defect.
	if took := time.Since(acked); took > time.Second {
		t.Logf("reported after %v, want a second at most (a busy machine?)", took)
	}
	if n.metric("castellan_agent_push_seconds", "sds") < 2 {
		t.Error("pushes on SDS were not measured")
	}
}

func TestEachWorkloadSeesItsOwnPolicy(t *testing.T) {
	s := agenttest.New(t)
	var both []xds.Resource
	for _, sa := range []string{"orders", "frontend"} {
		r, err := xds.NewResource("uid-"+sa, &castellanv1.WorkloadPolicy{Namespace: "shop", ServiceAccount: sa})
		if err != nil {
			t.Fatal(err)
		}
		both = append(both, r)
	}
	s.Table.Set(upstream.TypeWorkloadPolicy, xds.NewSnapshot(both...))
	s.Publish("shop/orders", &castellanv1.ServiceIdentity{Namespace: "shop", Name: "orders"})
	n := start(t, s, configure(t, s, account, "shop/frontend"))
	n.ready()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	stream, err := discoveryv3.NewAggregatedDiscoveryServiceClient(n.dial(0)).DeltaAggregatedResources(ctx)
	if err != nil {
		t.Fatal(err)
	}
	got := map[string][]string{}
	for i, url := range upstream.Types() {
		r := &discoveryv3.DeltaDiscoveryRequest{TypeUrl: url}
		if i == 0 {
			r.Node = &corev3.Node{Id: "proxy-1"}
		}
		ask(t, stream, r)
		m := answer(t, stream)
		for _, res := range m.GetResources() {
			got[m.GetTypeUrl()] = append(got[m.GetTypeUrl()], res.GetName())
		}
		ask(t, stream, &discoveryv3.DeltaDiscoveryRequest{TypeUrl: url, ResponseNonce: m.GetNonce()})
	}
	want := map[string][]string{
		upstream.TypeWorkloadPolicy: {"uid-orders"}, upstream.TypeServiceIdentity: {"shop/orders"}, upstream.TypeBundle: {agenttest.TrustDomain},
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("orders sees %v, want %v", got, want)
	}

	t.Run("a change travels on, a refusal travels back", func(t *testing.T) {
		next, err := xds.NewResource("uid-orders", &castellanv1.WorkloadPolicy{Namespace: "shop", ServiceAccount: "orders", DenyAll: true})
		if err != nil {
			t.Fatal(err)
		}
		changed := time.Now()
		s.Table.Set(upstream.TypeWorkloadPolicy, xds.NewSnapshot(next, both[1]))
		m := answer(t, stream)
		if took := time.Since(changed); took > time.Second {
			t.Logf("changed after %v, want a second at most (a busy machine?)", took)
		}
		if m.GetTypeUrl() != upstream.TypeWorkloadPolicy || m.GetResources()[0].GetVersion() != next.Version {
			t.Errorf("got %v", m)
		}
		ask(t, stream, &discoveryv3.DeltaDiscoveryRequest{
			TypeUrl: upstream.TypeWorkloadPolicy, ResponseNonce: m.GetNonce(), ErrorDetail: &statuspb.Status{Message: "cannot compile"},
		})
		eventually(t, func() error {
			for _, r := range s.Reports() {
				if text := r.String(); strings.Contains(text, next.Version) && strings.Contains(text, "cannot compile") && strings.Contains(text, both[0].Version) {
					return nil
				}
			}
			return fmt.Errorf("the refusal was not reported")
		})
	})
	t.Run("what was received stays while the server is away, and is reported to the next", func(t *testing.T) {
		s.Stop()
		eventually(t, func() error {
			if n.metric("castellan_agent_server_connected", "") != 0 {
				return fmt.Errorf("still connected")
			}
			return nil
		})
		again, err := discoveryv3.NewAggregatedDiscoveryServiceClient(n.dial(0)).DeltaAggregatedResources(ctx)
		if err != nil {
			t.Fatal(err)
		}
		ask(t, again, &discoveryv3.DeltaDiscoveryRequest{TypeUrl: upstream.TypeWorkloadPolicy})
		if m := answer(t, again); len(m.GetResources()) != 1 || m.GetResources()[0].GetName() != "uid-orders" {
			t.Errorf("got %v", m)
		}
		n.ready()
		before := len(s.Reports())
		s.Start()
		eventually(t, func() error {
			if len(s.Reports()) == before {
				return fmt.Errorf("no report after the server came back")
			}
			return nil
		})
	})
	t.Run("a stream that ends leaves the report", func(t *testing.T) {
		cancel()
		eventually(t, func() error {
			reports := s.Reports()
			for _, w := range reports[len(reports)-1].GetWorkloads() {
				if len(w.GetStreams()) > 0 {
					return fmt.Errorf("still %d streams", len(w.GetStreams()))
				}
			}
			return nil
		})
	})
}

func TestABundleWithoutRootsIsRefused(t *testing.T) {
	s := agenttest.New(t)
	n := start(t, s, configure(t, s, account))
	n.ready()
	w := watch(t, n, 0)
	if got := w.next(t).Bundles.Len(); got != 1 {
		t.Fatalf("%d bundles", got)
	}
	s.Publish(agenttest.TrustDomain, &castellanv1.Bundle{TrustDomain: agenttest.TrustDomain})
	eventually(t, func() error {
		if !strings.Contains(n.logs.String(), "has 0 roots, want 1 to 64") {
			return fmt.Errorf("not refused")
		}
		return nil
	})
	if c, err := n.spiffe(0).FetchX509Context(t.Context()); err != nil || c.Bundles.Len() != 1 {
		t.Errorf("the last good bundle is gone: %v", err)
	}
}

func TestANewRootIsPushedOnEveryStream(t *testing.T) {
	s := agenttest.New(t)
	n := start(t, s, configure(t, s, account))
	n.ready()
	w := watch(t, n, 0)
	w.next(t)
	s.SetBundle(s.Authority().Root, agenttest.NewAuthority(t, "next").Root)
	for {
		b, ok := w.next(t).Bundles.Get(n.trustDomain())
		if ok && len(b.X509Authorities()) == 2 {
			break
		}
	}
}

func TestServerThatTakesTheAgentsCertificateNoMore(t *testing.T) {
	s := agenttest.New(t)
	s.Set(func(k *agenttest.Knobs) { k.TTL = 4 * time.Second })
	n := start(t, s, configure(t, s, account))
	n.ready()
	streams := s.Streams()
	s.Set(func(k *agenttest.Knobs) {
		k.Stream = func() error { return status.Error(codes.Unauthenticated, "revoked") }
	})
	s.Stop()
	s.Start()
	eventually(t, func() error {
		if !strings.Contains(n.logs.String(), "the server refuses the agent's certificate; attesting again") {
			return fmt.Errorf("not noticed")
		}
		return nil
	})
	if err := n.agent.Checks()["workloads"](); err != nil {
		t.Errorf("workloads: %v", err)
	}
	s.Set(func(k *agenttest.Knobs) { k.Stream = nil })
	eventually(t, func() error {
		if s.Streams() == streams || n.metric("castellan_agent_server_connected", "") != 1 {
			return fmt.Errorf("not connected again")
		}
		return nil
	})
}
