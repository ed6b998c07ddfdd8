// Package reference decides as package authz does, by casbin: slowly, and
// plainly enough to be read beside the rules (docs/conformance.md). It exists so that something
// written apart says what the right answer is; the differential tests beside it
// hold the engine to that answer.
//
// It shares no code with the engine: of package authz it uses only the types that
// questions and answers are made of. It refuses nothing: what cannot be
// represented fails closed as the engine's does. It assumes, as the engine does,
// that what it is asked about was authenticated and normalised before.
package reference

import (
	_ "embed"
	"fmt"

	"github.com/casbin/casbin/v2"
	"github.com/casbin/casbin/v2/model"

	"castellan.dev/authz"
)

//go:embed model.conf
var modelText string

// mesh is the role that the mesh's trust domain and its aliases have.
const mesh = "mesh"

// Enforcer holds casbin's enforcer for one workload.
type Enforcer struct {
	casbin *casbin.Enforcer
}

// New compiles the documents that select the workload to lines of casbin policy.
func New(cfg authz.Config) (*Enforcer, error) {
	m, err := model.NewModelFromString(modelText)
	if err != nil {
		return nil, fmt.Errorf("reference: model: %w", err)
	}
	// Plain, not cached: a cached enforcer goes on allowing after a policy changed.
	e, err := casbin.NewEnforcer(m)
	if err != nil {
		return nil, fmt.Errorf("reference: %w", err)
	}
	for _, td := range knownDomains(cfg) {
		if _, err := e.AddGroupingPolicy(td, mesh); err != nil {
			return nil, fmt.Errorf("reference: trust domain %q: %w", td, err)
		}
	}
	if added, err := e.AddPolicies(lines(cfg)); err != nil || !added {
		return nil, fmt.Errorf("reference: policy not taken by casbin: %w", err)
	}
	functions := &matchers{domains: func() ([]string, error) { return e.GetUsersForRole(mesh) }}
	for name, f := range functions.byName() {
		e.AddFunction(name, f)
	}
	return &Enforcer{casbin: e}, nil
}

// knownDomains lists the mesh's trust domain and its aliases; where the settings
// name none it is the workload's own, and where that is not known either, the
// field's default.
func knownDomains(cfg authz.Config) []string {
	td := cfg.Mesh.TrustDomain
	if td == "" {
		td = cfg.Workload.TrustDomain.Name()
	}
	if td == "" {
		td = "cluster.local"
	}
	return append([]string{td}, cfg.Mesh.TrustDomainAliases...)
}

// Decide answers for an HTTP request. The token is given beside the request,
// whose own claims are the engine's precomputed form.
func (e *Enforcer) Decide(peer authz.Peer, r *authz.Request, token *Token) (allowed bool, action string, err error) {
	remote := r.RemoteIP
	if !remote.IsValid() {
		remote = peer.RemoteIP
	}
	c := newCall(peer, remote)
	c.protocol = "http"
	c.request, c.token = r, token
	return e.enforce(c)
}

// DecideTCP answers for a connection that is not HTTP.
func (e *Enforcer) DecideTCP(peer authz.Peer) (allowed bool, action string, err error) {
	c := newCall(peer, peer.RemoteIP)
	c.protocol = "tcp"
	c.request = &authz.Request{}
	return e.enforce(c)
}

// enforce asks casbin. An error denies.
func (e *Enforcer) enforce(c *call) (allowed bool, action string, err error) {
	allowed, line, err := e.casbin.EnforceEx(c.protocol, c.peer, c.source, c.remote, c.port,
		c.request.Host, c.request.Method, c.request.Path, c.token, c)
	if err != nil {
		return false, "", fmt.Errorf("reference: %w", err)
	}
	if len(line) > columnAction {
		action = line[columnAction]
	}
	return allowed, action, nil
}
