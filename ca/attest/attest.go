// Package attest decides who a caller is: trust rule 2 (docs/threat-model.md).
//
// A caller brings the workload's service-account token and, as a node agent, its
// own. The first says which pod asks, the second on which node. A token counts
// when signature, issuer, audience and times hold, it is bound to a pod and a
// node, the pod still exists with that UID and service-account UID on that node,
// and the agent's node is the same. Tokens are verified here, with the issuer's
// keys, or by their issuer (Reviewer); all else is the same in both modes.
//
// It refuses what it cannot decide: with the view of pods or the issuer's keys
// away the answer is Unavailable, never a permission. It assumes that the
// configured issuers give a pod's token to that pod only, and that the Pods it
// asks are current.
package attest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"castellan.dev/identity"
	"castellan.dev/internal/jws"
)

// Ways an identity was vouched for, as the ledger keeps them.
const (
	ByAgent         = "agent"         // a node agent, for a pod of its node
	ByAgentItself   = "agent-self"    // a node agent, for itself
	ByDirectCaller  = "direct"        // the pod itself, listed in directCallers
	ByImpersonation = "impersonation" // a node proxy, listed in trustedNodeAccounts
)

// DefaultNamespace is where the mesh itself is installed unless configured otherwise.
const DefaultNamespace = "castellan-system"

// Credentials are what a caller brought.
type Credentials struct {
	// WorkloadToken is the token of the pod that asks.
	WorkloadToken string
	// AgentToken is the token of the agent that presents it, empty for direct callers.
	AgentToken string
	// ClusterID is the cluster the caller says it is in; empty: it does not say.
	ClusterID string
	// Impersonate is the SPIFFE ID a node proxy asks for in place of its own.
	Impersonate string
}

// Attested is who asks. It is made by Attest only.
type Attested struct {
	Workload identity.Workload
	PodUID   string
	Node     string
	Cluster  string
	// Attestor is one of the By constants.
	Attestor string
	// IsAgent says that the identity is a node agent's own.
	IsAgent bool
}

// KeySource gives an issuer's keys; *jws.Remote and *jws.File are some.
type KeySource interface {
	Keys() (*jws.KeySet, error)
	Err() error
	Refetch(ctx context.Context) error
}

// Issuer is who signs tokens of one cluster.
type Issuer struct {
	Name      string
	Audiences []string
	Cluster   string
	Keys      KeySource
}

// Config configures an Attestor.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	// Issuers are those whose tokens are verified here.
	Issuers []Issuer
	// Reviewer, if set, verifies the tokens of all other issuers.
	Reviewer Reviewer
	// ReviewAudiences and ReviewCluster are for the Reviewer what an Issuer's are.
	ReviewAudiences []string
	ReviewCluster   string
	Pods            Pods
	// AgentAccounts are whose token proves a node. None: only direct callers are attested.
	AgentAccounts []identity.Account
	// DirectCallers may ask for themselves without an agent; default nobody.
	DirectCallers []identity.Account
	// TrustedNodeAccounts may ask for pods of their node; default nobody. Agents,
	// these accounts themselves and all of ReservedNamespaces are never given away so.
	TrustedNodeAccounts []identity.Account
	// ReservedNamespaces are where the mesh itself runs, the server's account
	// included; DefaultNamespace is always one of them.
	ReservedNamespaces []string
	// AgentsAreListed has an agent's own pod looked up as any other. Off
	// Kubernetes agents are no pods: there their token is all there is.
	AgentsAreListed bool
	Log             *slog.Logger
	Now             func() time.Time
}

// Attestor attests callers. It is safe for concurrent use.
type Attestor struct {
	cfg     Config
	issuers map[string]*Issuer
	agents  *agentCache
	reviews *reviews // nil without a Reviewer
}

// New checks cfg.
func New(cfg Config) (*Attestor, error) {
	if cfg.TrustDomain.IsZero() {
		return nil, errors.New("attest: no trust domain")
	}
	if cfg.Pods == nil {
		return nil, errors.New("attest: nothing to ask for pods")
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	a := &Attestor{cfg: cfg, issuers: map[string]*Issuer{}, agents: newAgentCache(maxAgents)}
	for i := range cfg.Issuers {
		is := cfg.Issuers[i]
		switch {
		case is.Name == "" || is.Keys == nil:
			return nil, fmt.Errorf("attest: issuers[%d]: a name and keys are needed", i)
		case len(is.Audiences) == 0:
			// An empty list would accept tokens made for anyone.
			return nil, fmt.Errorf("attest: issuers[%d]: at least one audience is needed", i)
		case a.issuers[is.Name] != nil:
			return nil, fmt.Errorf("attest: issuers[%d]: %q is listed twice", i, is.Name)
		}
		a.issuers[is.Name] = &is
	}
	switch {
	case cfg.Reviewer != nil && len(cfg.ReviewAudiences) == 0:
		return nil, errors.New("attest: reviews need at least one audience")
	case cfg.Reviewer != nil:
		a.reviews = newReviews(cfg)
	case len(a.issuers) == 0:
		return nil, errors.New("attest: no issuer; nobody could be attested")
	}
	return a, nil
}

// Attest decides who the caller is. Errors are *Error.
func (a *Attestor) Attest(ctx context.Context, c Credentials) (Attested, error) {
	if c.WorkloadToken == "" {
		return Attested{}, unauthenticated("no-token", "no workload token: metadata \"authorization: Bearer TOKEN\" is wanted")
	}
	var agent *claims
	if c.AgentToken != "" {
		var err error
		if agent, err = a.attestAgent(ctx, c.AgentToken); err != nil {
			return Attested{}, err
		}
	}
	workload := agent
	if c.WorkloadToken != c.AgentToken {
		var err error
		if workload, err = a.verify(ctx, c.WorkloadToken); err != nil {
			return Attested{}, prefix("workload token", err)
		}
	}
	if c.ClusterID != "" && c.ClusterID != workload.cluster {
		return Attested{}, unauthenticated("cluster", "caller says cluster %q, its token is of %q", clip(c.ClusterID), workload.cluster)
	}
	if agent != nil {
		if err := sameNode(workload, agent); err != nil {
			return Attested{}, err
		}
	}
	if err := a.checkPod(ctx, workload); err != nil {
		return Attested{}, err
	}
	switch {
	case c.Impersonate != "":
		return a.impersonate(ctx, workload, c.Impersonate)
	case agent == nil && !slices.Contains(a.cfg.DirectCallers, workload.account):
		return Attested{}, denied("no-agent", "%s asked without an agent token and is not in directCallers", workload.account)
	}
	attestor := ByAgent
	switch {
	case agent == nil:
		attestor = ByDirectCaller
	case c.AgentToken == c.WorkloadToken:
		attestor = ByAgentItself
	}
	return a.attested(workload, attestor)
}

func (a *Attestor) attested(c *claims, attestor string) (Attested, error) {
	w, err := identity.New(a.cfg.TrustDomain, c.account)
	if err != nil {
		return Attested{}, denied("identity", "%v", err)
	}
	return Attested{
		Workload: w, PodUID: c.podUID, Node: c.node, Cluster: c.cluster, Attestor: attestor,
		IsAgent: a.isAgent(c.account),
	}, nil
}

func (a *Attestor) isAgent(account identity.Account) bool {
	return slices.Contains(a.cfg.AgentAccounts, account)
}

func (a *Attestor) reserved(account identity.Account) bool {
	return account.Namespace() == DefaultNamespace || slices.Contains(a.cfg.ReservedNamespaces, account.Namespace()) ||
		a.isAgent(account) || slices.Contains(a.cfg.TrustedNodeAccounts, account)
}

// attestAgent verifies an agent's own token. Verified ones are remembered; times,
// keys and the agent's pod are looked at every time.
func (a *Attestor) attestAgent(ctx context.Context, token string) (*claims, error) {
	if c := a.agents.get(token); c != nil && a.stillGood(c) {
		return c, a.checkPod(ctx, c)
	}
	c, err := a.verify(ctx, token)
	if err != nil {
		return nil, prefix("agent token", err)
	}
	if !a.isAgent(c.account) {
		return nil, denied("not-an-agent", "agent token is of %s, which is not in agentAccounts", c.account)
	}
	if c.issuer != nil {
		a.agents.put(token, c)
	}
	return c, a.checkPod(ctx, c)
}

// stillGood re-checks what changes with time about a remembered token.
func (a *Attestor) stillGood(c *claims) bool {
	keys, err := c.issuer.Keys.Keys()
	return err == nil && keys == c.keys && c.token.CheckTimes(a.cfg.Now()) == nil
}

// verify finds out what a token proves.
func (a *Attestor) verify(ctx context.Context, token string) (*claims, error) {
	// Before anybody is asked: what is no token costs nobody a question.
	u, err := jws.Parse(token)
	if err != nil {
		return nil, unauthenticated(reasonOf(err), "%w", err)
	}
	switch issuer := a.issuers[u.Issuer()]; {
	case issuer != nil:
		return a.verifyHere(ctx, u, issuer)
	case a.reviews != nil:
		return a.reviews.verify(ctx, token)
	}
	return nil, unauthenticated("issuer", "issuer %q is not configured", clip(u.Issuer()))
}

// verifyHere checks a token against its issuer's keys, fetching them anew (rate
// bounded by the source) when the key is unknown.
func (a *Attestor) verifyHere(ctx context.Context, u *jws.Unverified, issuer *Issuer) (*claims, error) {
	expect := jws.Expect{Issuer: issuer.Name, Audiences: issuer.Audiences}
	keys, _ := issuer.Keys.Keys()
	t, err := u.Verify(keys, expect, a.cfg.Now())
	if errors.Is(err, jws.ErrUnknownKey) || errors.Is(err, jws.ErrUnavailable) {
		_ = issuer.Keys.Refetch(ctx) // its failure shows in Err below
		keys, _ = issuer.Keys.Keys()
		t, err = u.Verify(keys, expect, a.cfg.Now())
	}
	if err != nil {
		if cause := issuer.Keys.Err(); cause != nil && (errors.Is(err, jws.ErrUnknownKey) || errors.Is(err, jws.ErrUnavailable)) {
			// The key may be one that we could not fetch: not known now, so neither
			// a permission nor a refusal for good.
			return nil, unavailable("keys", "%w: keys of %q: %w", err, issuer.Name, cause)
		}
		return nil, unauthenticated(reasonOf(err), "%w", err)
	}
	c, err := readClaims(t)
	if err != nil {
		return nil, unauthenticated("claims", "%w", err)
	}
	c.issuer, c.cluster, c.keys = issuer, issuer.Cluster, keys
	return c, nil
}

// sameNode holds trust rule 2: the workload's token is presented by the agent of its node.
func sameNode(w, agent *claims) error {
	if w.cluster != agent.cluster {
		return denied("node", "workload token is of cluster %q, the agent's of %q", w.cluster, agent.cluster)
	}
	if w.node != agent.node {
		return denied("node", "workload token of %s is for node %q, the agent is on %q", w.account, w.node, agent.node)
	}
	if w.nodeUID != "" && agent.nodeUID != "" && w.nodeUID != agent.nodeUID {
		return denied("node", "node %q had UID %q for the workload token and %q for the agent's: it was replaced", w.node, w.nodeUID, agent.nodeUID)
	}
	return nil
}

// checkPod asks whether the token's pod is still what the token says.
func (a *Attestor) checkPod(ctx context.Context, c *claims) error {
	if a.isAgent(c.account) && !a.cfg.AgentsAreListed {
		return nil
	}
	pod, err := a.cfg.Pods.Pod(ctx, PodRef{
		Namespace: c.account.Namespace(), Name: c.podName, UID: c.podUID, Account: c.account, ServiceAccountUID: c.accountUID,
	})
	switch {
	case errors.Is(err, ErrNoAccount):
		return denied("account-gone", "service account %s does not exist (any more)", c.account)
	case errors.Is(err, ErrNotFound):
		return denied("pod-gone", "pod %s/%s with UID %q does not exist (any more)", c.account.Namespace(), c.podName, c.podUID)
	case err != nil:
		return unavailable("pods", "pods are not known now: %w", err)
	case pod.Account != c.account || pod.UID != c.podUID:
		return denied("pod-changed", "pod %q is of %s, the token of %s", c.podUID, pod.Account, c.account)
	case pod.ServiceAccountUID != "" && pod.ServiceAccountUID != c.accountUID:
		return denied("account-changed", "service account %s has UID %q, the token says %q: it was made anew", c.account, pod.ServiceAccountUID, c.accountUID)
	case pod.Name != "" && pod.Name != c.podName:
		return denied("pod-changed", "pod %q has name %q, the token says %q", c.podUID, pod.Name, c.podName)
	case pod.Node != c.node:
		return denied("node", "pod %q runs on node %q, the token says %q", c.podUID, pod.Node, c.node)
	}
	return nil
}

// impersonate serves node proxies: the caller is listed, and a live pod of the
// asked identity runs on its node.
func (a *Attestor) impersonate(ctx context.Context, caller *claims, asked string) (Attested, error) {
	if !slices.Contains(a.cfg.TrustedNodeAccounts, caller.account) {
		return Attested{}, denied("impersonation", "%s asked for %q and is not in trustedNodeAccounts", caller.account, clip(asked))
	}
	id, err := spiffeid.FromString(asked)
	if err != nil {
		return Attested{}, denied("impersonation", "%s asked for %q: %w", caller.account, clip(asked), err)
	}
	w, err := identity.FromID(id)
	if err != nil || w.TrustDomain() != a.cfg.TrustDomain {
		return Attested{}, denied("impersonation", "%s asked for %q, which is no workload of %q", caller.account, clip(asked), a.cfg.TrustDomain.Name())
	}
	if a.reserved(w.Account()) {
		// With an agent's certificate he could acknowledge for it, with the server's be
		// the server.
		return Attested{}, denied("impersonation-reserved", "%s asked for %s, which is the mesh's own and never impersonated", caller.account, w.Account())
	}
	pods, err := a.cfg.Pods.OnNode(ctx, caller.node, w.Account())
	if err != nil {
		return Attested{}, unavailable("pods", "pods are not known now: %w", err)
	}
	if len(pods) == 0 {
		return Attested{}, denied("impersonation", "%s asked for %s, of which no pod runs on node %q", caller.account, w.Account(), caller.node)
	}
	return Attested{
		Workload: w, PodUID: pods[0].UID, Node: caller.node, Cluster: caller.cluster,
		Attestor: ByImpersonation, IsAgent: false,
	}, nil
}
