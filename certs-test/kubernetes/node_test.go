package kubernetes_test

import (
	"context"
	"errors"
	"fmt"
	"testing"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"

	castellanv1 "castellan.dev/api/castellan/v1"
)

// Promise: an agent is given the policies of its own node's workloads alone. The test
// asks as the agent of a node would: with a certificate for the agent's own token.
func TestAgentsGetTheirNodesPoliciesOnly(t *testing.T) {
	t.Parallel()
	from := site(t)
	agent := agentOf(t, from.far.Node)
	token := agent.token(t)
	cert := issues(t, dialServer(t, nil), request{token: token, agentToken: token})
	conn := dialServer(t, cert)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	stream, err := discoveryv3.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(ctx)
	if err != nil {
		t.Fatal(err)
	}
	err = stream.Send(&discoveryv3.DeltaDiscoveryRequest{
		Node: &corev3.Node{Id: agent.Node}, TypeUrl: castellanv1.TypeWorkloadPolicy, ResourceNamesSubscribe: []string{"*"},
	})
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]bool{}
	for !got[from.far.UID] {
		answer, err := stream.Recv()
		if err != nil {
			t.Fatalf("%d policies, and not that of %s (%s): %v", len(got), from.far.Name, from.far.UID, err)
		}
		for _, r := range answer.GetResources() {
			got[r.GetName()] = true
		}
	}
	for _, foreign := range []*app{from.web, from.other, from.plain} {
		if got[foreign.UID] {
			t.Errorf("the agent of %s was given the policy of %s on %s", agent.Node, foreign.Name, foreign.Node)
		}
	}
	var list struct{ Items []podStatus }
	if err := api.get("/api/v1/pods?fieldSelector=spec.nodeName%3D"+from.web.Node, &list); err != nil {
		t.Fatal(err)
	}
	for _, p := range list.Items {
		if got[p.Metadata.UID] {
			t.Errorf("the policy of %s, which is on %s", p.Metadata.Name, p.Spec.NodeName)
		}
	}
}

// Promise: without an agent's certificate there is no discovery.
func TestDiscoveryIsForAgents(t *testing.T) {
	t.Parallel()
	from := site(t)
	here := agentOf(t, from.web.Node).token(t)
	web := issues(t, dialServer(t, nil), request{token: from.web.token(t), agentToken: here})
	for what, conn := range map[string]error{
		"nobody":     ask(t, dialServer(t, nil)),
		"a workload": ask(t, dialServer(t, web)),
	} {
		refuses(t, what, conn)
	}
}

func ask(t *testing.T, conn grpc.ClientConnInterface) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	stream, err := discoveryv3.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(ctx)
	if err != nil {
		return err
	}
	err = stream.Send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: castellanv1.TypeWorkloadPolicy, ResourceNamesSubscribe: []string{"*"}})
	answer, recvErr := stream.Recv()
	if answer != nil {
		return fmt.Errorf("was given %d resources", len(answer.GetResources()))
	}
	if recvErr != nil {
		return recvErr
	}
	return errors.Join(err, errors.New("no answer"))
}
