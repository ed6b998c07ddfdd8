package proxy

import (
	"context"
	"errors"
	"fmt"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"

	castellanv1 "castellan.dev/api/castellan/v1"
	"castellan.dev/internal/jws"
	"castellan.dev/internal/run"
	"castellan.dev/internal/xds"
)

const (
	typePrefix  = "type.googleapis.com/"
	typeSecret  = typePrefix + "envoy.extensions.transport_sockets.tls.v3.Secret"
	typePolicy  = typePrefix + "castellan.v1.WorkloadPolicy"
	typeService = typePrefix + "castellan.v1.ServiceIdentity"
	typeJWKS    = typePrefix + "castellan.v1.Jwks"
	typeBundle  = typePrefix + "castellan.v1.Bundle"
	typeDenied  = typePrefix + "castellan.v1.Denylist"

	methodSecrets   = "/envoy.service.secret.v3.SecretDiscoveryService/DeltaSecrets"
	methodResources = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources"

	// secretSVID and secretRoots are Istio's names.
	secretSVID  = "default"
	secretRoots = "ROOTCA"

	// maxUpdate bounds one message of the agent.
	maxUpdate = 64 << 20
	nodeID    = "castellan-proxy"
)

// follow keeps the state up to date from the agent's socket: certificate and
// bundle by SDS, everything else by ADS. While the agent is away, what it last
// said stays in force, the certificate until it expires.
func (p *Proxy) follow(ctx context.Context) error {
	conn, err := grpc.NewClient("unix:"+p.cfg.Proxy.AgentSocket,
		// The socket's file and the agent's check of our uid are what protects it.
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxUpdate)),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.5, Jitter: 0.2, MaxDelay: time.Second},
			MinConnectTimeout: 5 * time.Second,
		}),
		grpc.WithIdleTimeout(0), grpc.WithDisableServiceConfig())
	if err != nil {
		return fmt.Errorf("proxy: agent socket: %w", err)
	}
	defer conn.Close()
	secrets := xds.NewClient(xds.ClientConfig{
		Open: open(conn, methodSecrets), NodeID: nodeID, Log: p.log.With("stream", "sds"), MaxBackoff: time.Second,
		Subscriptions: []xds.Subscription{{TypeURL: typeSecret, Names: []string{secretSVID, secretRoots}, Apply: p.counted("secret", p.applySecrets)}},
	})
	resources := xds.NewClient(xds.ClientConfig{
		Open: open(conn, methodResources), NodeID: nodeID, Log: p.log.With("stream", "ads"), MaxBackoff: time.Second,
		Subscriptions: []xds.Subscription{
			{TypeURL: typeJWKS, Apply: p.counted("jwks", p.applyKeys)},
			{TypeURL: typeDenied, Apply: p.counted("denylist", p.applyDenylist)},
			{TypeURL: typePolicy, Apply: p.counted("policy", p.applyPolicies)},
			{TypeURL: typeService, Apply: p.counted("service", p.applyServices)},
			// Our own trust domain's roots come with the certificate, by SDS. The
			// bundles are followed so that they show as applied where they are waited for.
			{TypeURL: typeBundle, Apply: func([]xds.Resource, []string) error { return nil }},
		},
	})
	return run.All(ctx, secrets.Run, resources.Run)
}

func open(conn *grpc.ClientConn, method string) func(context.Context) (xds.DeltaClientStream, error) {
	return func(ctx context.Context) (xds.DeltaClientStream, error) {
		stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, method)
		if err != nil {
			return nil, err
		}
		return &grpc.GenericClientStream[discoveryv3.DeltaDiscoveryRequest, discoveryv3.DeltaDiscoveryResponse]{ClientStream: stream}, nil
	}
}

type applyFunc func(changed []xds.Resource, removed []string) error

// counted counts and logs what became of updates.
func (p *Proxy) counted(resource string, apply applyFunc) applyFunc {
	return func(changed []xds.Resource, removed []string) error {
		err := apply(changed, removed)
		result := "applied"
		if err != nil {
			result = "refused"
			p.log.Error("update from the agent refused", "resource", resource, "error", err)
		} else if len(changed)+len(removed) > 0 {
			p.log.Info("update from the agent applied", "resource", resource, "changed", names(changed), "removed", removed)
		}
		p.metrics.updates.WithLabelValues(resource, result).Inc()
		return err
	}
}

func names(resources []xds.Resource) []string {
	out := make([]string, 0, min(len(resources), 10))
	for _, r := range resources {
		if len(out) == cap(out) {
			break
		}
		out = append(out, r.Name+"@"+r.Version)
	}
	return out
}

func unpack(r xds.Resource, into proto.Message) error {
	if err := proto.Unmarshal(r.Body.GetValue(), into); err != nil {
		return fmt.Errorf("%s: %w", r.Name, err)
	}
	return nil
}

// applySecrets takes certificate and bundle. A secret that is said to be gone
// keeps its last good value: an agent's trouble must not take down what is
// valid, and what is not is refused by its own expiry.
func (p *Proxy) applySecrets(changed []xds.Resource, _ []string) error {
	var errs []error
	var apply []func(*inputs)
	for _, r := range changed {
		secret, err := parseSecret(r.Body.GetValue())
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", r.Name, err))
			continue
		}
		switch r.Name {
		case secretSVID:
			cert, id, err := parseSVID(secret, p.now())
			if err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", r.Name, err))
				continue
			}
			apply = append(apply, func(in *inputs) { in.svid, in.id = cert, id })
		case secretRoots:
			roots, err := parseRoots(secret)
			if err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", r.Name, err))
				continue
			}
			apply = append(apply, func(in *inputs) { in.roots = roots })
		}
	}
	if len(apply) > 0 {
		p.store.update(func(in *inputs) {
			for _, f := range apply {
				f(in)
			}
		})
	}
	return errors.Join(errs...)
}

// applyPolicies takes the one policy of our workload. Gone means denied.
func (p *Proxy) applyPolicies(changed []xds.Resource, removed []string) error {
	var errs []error
	compiled := make(map[string]*policyInput, len(changed))
	for _, r := range changed {
		var wp castellanv1.WorkloadPolicy
		if err := unpack(r, &wp); err != nil {
			// Unreadable: what it wanted denied cannot be known.
			errs = append(errs, err)
			compiled[r.Name] = nil
			continue
		}
		in, err := compilePolicy(&wp, p.store.keySet, p.now)
		compiled[r.Name] = in
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", r.Name, err))
		}
	}
	if len(changed)+len(removed) == 0 {
		return nil
	}
	p.store.update(func(in *inputs) {
		for _, name := range removed {
			delete(in.policies, name)
		}
		for name, c := range compiled {
			in.policies[name] = c
		}
		if n := len(in.policies); n > 1 {
			errs = append(errs, fmt.Errorf("%d policies for one workload; all is denied until there is one", n))
		}
		if in.policy() == nil {
			p.log.Error("no policy of our own; everything is denied", "policies", len(in.policies), "workload", in.id.String())
		}
	})
	return errors.Join(errs...)
}

func (p *Proxy) applyServices(changed []xds.Resource, removed []string) error {
	var errs []error
	p.store.update(func(in *inputs) {
		in.services.known = true
		for _, name := range removed {
			in.services.set(name, nil)
		}
		// One after the other, so that a mesh's worth of messages is not in memory at once.
		for _, r := range changed {
			if err := in.services.take(r); err != nil {
				errs = append(errs, err)
			}
		}
	})
	return errors.Join(errs...)
}

// applyKeys takes end-user token issuers' keys. A set that cannot be read
// counts as none: tokens of that issuer are refused, requests without pass on.
func (p *Proxy) applyKeys(changed []xds.Resource, removed []string) error {
	var errs []error
	next := map[string]*jws.KeySet{}
	if now := p.store.keys.Load(); now != nil {
		for name, set := range *now {
			next[name] = set
		}
	}
	for _, name := range removed {
		delete(next, name)
	}
	for _, r := range changed {
		var keys castellanv1.Jwks
		delete(next, r.Name)
		if err := unpack(r, &keys); err != nil {
			errs = append(errs, err)
			continue
		}
		if len(keys.GetJwks()) == 0 {
			p.log.Warn("keys of a token issuer are not available; its tokens are refused", "source", r.Name, "error", keys.GetError())
			continue
		}
		set, err := jws.ParseJWKS(keys.GetJwks())
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", r.Name, err))
			continue
		}
		next[r.Name] = set
	}
	p.store.keys.Store(&next)
	return errors.Join(errs...)
}

func (p *Proxy) applyDenylist(changed []xds.Resource, removed []string) error {
	if len(changed)+len(removed) == 0 {
		return nil
	}
	var list castellanv1.Denylist
	for _, r := range changed {
		var one castellanv1.Denylist
		if err := unpack(r, &one); err != nil {
			return err // the list before stays
		}
		proto.Merge(&list, &one)
	}
	if len(changed) == 0 {
		// Said to be gone: nobody is denied any more.
		p.log.Warn("deny list removed")
	}
	p.store.update(func(in *inputs) { in.denied = newDenylist(&list) })
	return nil
}
