package cli

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"castellan.dev/api/policy"
	"castellan.dev/authz"
	"castellan.dev/discovery"
	"castellan.dev/identity"
	"castellan.dev/internal/judge"
	"castellan.dev/internal/kube"
	"castellan.dev/internal/workloads"
)

// Whether a document that could select a workload is enforced there.
const (
	inForce      = "in force"
	notAcked     = "not acknowledged"
	lastGood     = "REFUSED, last good in force"
	deniesAll    = "REFUSED, denies all"
	refusedState = "REFUSED"
	asWritten    = "valid" // whether it is enforced could not be asked
)

// workloadPolicy is everything that decides who may talk to one workload.
type workloadPolicy struct {
	Namespace      string `json:"namespace"`
	Pod            string `json:"pod,omitempty"`
	Node           string `json:"node,omitempty"`
	ServiceAccount string `json:"serviceAccount"`
	SPIFFEID       string `json:"spiffeId"`
	InMesh         bool   `json:"inMesh"`
	// Enforced is yes, no (Warnings say why) or unknown.
	Enforced string         `json:"enforced"`
	Ports    []portPolicy   `json:"ports"`
	Policies []policyEffect `json:"policies"`
	Tokens   []tokenRule    `json:"tokens"`
	Warnings []string       `json:"warnings"`

	// proxy is what the server knows of its proxy, nil where nobody could say.
	proxy *proxyView
}

// portPolicy is one port of a workload; number 0 stands for all that are not declared.
type portPolicy struct {
	Number   uint16 `json:"number"`
	Protocol string `json:"protocol,omitempty"`
	MTLS     string `json:"mtls"`
	// HTTPOnly: it declares no protocol and has rules about HTTP, so that what is not
	// HTTP is refused.
	HTTPOnly bool `json:"httpOnly,omitempty"`
}

// policyEffect is one document, and what it is there.
type policyEffect struct {
	Kind      string `json:"kind"`
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	Action    string `json:"action,omitempty"`
	DryRun    bool   `json:"dryRun,omitempty"`
	// Selects is how widely it does: mesh, namespace or workload.
	Selects  string          `json:"selects"`
	Rules    int             `json:"rules"`
	State    string          `json:"state"`
	Findings []authz.Finding `json:"findings,omitempty"`
}

// tokenRule is one issuer of end users' tokens.
type tokenRule struct {
	Issuer    string   `json:"issuer"`
	Audiences []string `json:"audiences,omitempty"`
	Keys      string   `json:"keys"`
	From      []string `json:"from"`
}

func (e *env) authzCheckCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "check POD",
		Short: "Show what decides who may talk to a workload",
		Long: `Show what decides who may talk to a pod (NAME, pod/NAME, or deploy/NAME for one of its
pods; off Kubernetes NAMESPACE/ACCOUNT): mutual TLS by port, the policies that select it
and whether they are enforced, whose end users' tokens it takes, and what to be wary of.
Exit code 2 where something is not enforced as it is written.

` + howTargeted,
		Example: `  castellan authz check orders-7d4b9 -n shop
  castellan authz check deploy/orders -n shop -o yaml`,
		Args: oneArg("a pod"),
	}
	target := e.targetFlags(cmd)
	cmd.ValidArgsFunction = target.kube.completePods("", cobra.ShellCompDirectiveNoFileComp)
	meshFile := cmd.Flags().String("mesh", "", "`FILE` with mesh settings: YAML, the keys of the server's mesh section at top level")
	formats := []string{"table", "json", "yaml"}
	format := outputFlag(cmd, formats...)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := checkOutput(*format, formats...); err != nil {
			return err
		}
		stop := e.progress("reading policies")
		s, w, err := e.workloadScene(cmd.Context(), target, args[0], *meshFile)
		stop()
		if err != nil {
			return err
		}
		view, err := s.policyOf(w)
		if err != nil {
			return err
		}
		if *format != "table" {
			err = writeData(e.out, *format, view)
		} else {
			err = view.print(e.out, s)
		}
		if err == nil && view.Enforced == "no" {
			err = errNegative
		}
		return err
	}
	return cmd
}

// workloadScene finds the workload that is asked about, and what there is around it.
func (e *env) workloadScene(ctx context.Context, t *target, name, meshFile string) (*scene, *workloads.Workload, error) {
	cluster, err := t.onCluster()
	if err != nil {
		return nil, nil, err
	}
	if !cluster {
		return e.localWorkload(ctx, t, name, meshFile)
	}
	ref, err := parsePodArg(name)
	if err != nil {
		return nil, nil, err
	}
	namespace, err := t.kube.namespace()
	if err != nil {
		return nil, nil, err
	}
	client, err := t.kube.client()
	if err != nil {
		return nil, nil, err
	}
	uid, err := uidOf(ctx, client, ref, namespace)
	if err != nil {
		return nil, nil, err
	}
	s, err := e.clusterScene(ctx, t.kube, namespace, nil, meshFile)
	if err != nil {
		return nil, nil, err
	}
	if w := s.workload(uid); w != nil {
		return s, w, nil
	}
	return nil, nil, fmt.Errorf("%s in namespace %s has ended, or is on no node yet", ref, namespace)
}

func uidOf(ctx context.Context, client *kube.Client, ref podRef, namespace string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	pod, err := ref.find(ctx, client, namespace)
	if err != nil {
		return "", err
	}
	return string(pod.UID), nil
}

// localWorkload is the same off Kubernetes, where a workload is its account.
func (e *env) localWorkload(ctx context.Context, t *target, name, meshFile string) (*scene, *workloads.Workload, error) {
	file, err := t.upMesh()
	if err != nil {
		return nil, nil, err
	}
	s, err := e.localScene(nil, meshFile, *t.up)
	if err != nil {
		return nil, nil, err
	}
	conn, err := dialSocket(file.Server.Admin)
	if err == nil {
		s.status, s.unasked = statusOver(ctx, &admin{ClientConn: conn})
	}
	for i := range s.known.Workloads {
		if w := &s.known.Workloads[i]; name == w.Namespace+"/"+w.ServiceAccount {
			return s, w, nil
		}
	}
	return nil, nil, invalidf("%q is no workload of this mesh; want NAMESPACE/ACCOUNT", name)
}

// policyOf puts together what there is to say of a workload.
func (s *scene) policyOf(w *workloads.Workload) (*workloadPolicy, error) {
	account, err := identity.NewAccount(w.Namespace, w.ServiceAccount)
	if err != nil {
		return nil, err
	}
	id, err := identity.New(s.domain, account)
	if err != nil {
		return nil, err
	}
	ports := map[uint16]string{}
	for _, p := range w.Ports {
		ports[p.Number] = p.Protocol
	}
	v := &workloadPolicy{
		Namespace: w.Namespace, Pod: w.PodName, Node: w.Node, ServiceAccount: w.ServiceAccount, SPIFFEID: id.String(), InMesh: !w.OutsideMesh,
		Ports: []portPolicy{}, Policies: []policyEffect{}, Tokens: []tokenRule{}, Warnings: []string{},
	}
	if status := s.proxyOf(w.PodUID); status != nil {
		proxy := viewProxy(status, s.domain.Name(), now())
		v.proxy = &proxy
	}
	what := s.enforced(w)
	cfg := authz.Config{Documents: s.docs, Workload: authz.Workload{TrustDomain: s.domain, Account: account, Labels: w.Labels, Ports: ports}, Mesh: s.mesh, DenyAll: what.deny}
	snapshot, problems := authz.Compile(cfg)
	v.ports(cfg, snapshot)
	v.policies(s, w, ports)
	for _, r := range snapshot.JWTRules() {
		v.Tokens = append(v.Tokens, describeTokens(r))
	}
	v.warn(s, what, problems)
	return v, nil
}

func (v *workloadPolicy) ports(cfg authz.Config, snapshot *authz.Snapshot) {
	about := judge.PortsWithHTTP(cfg)
	for _, n := range slices.Sorted(maps.Keys(cfg.Workload.Ports)) {
		protocol := cfg.Workload.Ports[n]
		v.Ports = append(v.Ports, portPolicy{Number: n, Protocol: protocol, MTLS: snapshot.MTLSMode(n).String(), HTTPOnly: protocol == "" && about.On(n)})
	}
	v.Ports = append(v.Ports, portPolicy{MTLS: snapshot.MTLSMode(0).String(), HTTPOnly: about.On(0)})
}

// policies lists the documents that select the workload, and those refused ones that
// could.
func (v *workloadPolicy) policies(s *scene, w *workloads.Workload, ports map[uint16]string) {
	for _, d := range s.docs {
		if !authz.Selects(d, w.Namespace, w.Labels, s.mesh) {
			continue
		}
		e := describeEffect(d, s.mesh)
		e.Findings = authz.ValidateFor(d, s.mesh, ports)
		e.State = v.stateOf(s, discovery.Ref{Kind: d.Kind, Namespace: d.Metadata.Namespace, Name: d.Metadata.Name})
		v.Policies = append(v.Policies, e)
	}
	for _, d := range s.refused {
		if !d.CouldSelect(w.Namespace, w.Labels, s.mesh) {
			continue
		}
		e := policyEffect{Kind: d.Ref.Kind, Namespace: d.Ref.Namespace, Name: d.Ref.Name, Selects: "perhaps", State: refusedState, Findings: d.Findings}
		switch status := s.statusOf(d.Ref); {
		case status.GetLastGoodInForce():
			e.State = lastGood
		case status != nil:
			e.State = deniesAll
		}
		v.Policies = append(v.Policies, e)
	}
}

// stateOf is whether a valid document is enforced at this workload.
func (v *workloadPolicy) stateOf(s *scene, ref discovery.Ref) string {
	status := s.statusOf(ref)
	switch {
	case s.status == nil:
		return asWritten
	case status.GetAccepted() && v.proxy != nil && v.proxy.ok():
		return inForce
	}
	return notAcked
}

// describeEffect says what a document is.
func describeEffect(d policy.Document, mesh policy.Mesh) policyEffect {
	e := policyEffect{Kind: d.Kind, Namespace: d.Metadata.Namespace, Name: d.Metadata.Name, Selects: "namespace"}
	var selector *policy.Selector
	switch {
	case d.Authorization != nil:
		e.Action, e.Rules, selector = strings.Trim(actionOf(d), " ()"), len(d.Authorization.Rules), d.Authorization.Selector
		e.DryRun = d.Metadata.Annotations["istio.io/dry-run"] == "true"
	case d.RequestAuthentication != nil:
		e.Rules, selector = len(d.RequestAuthentication.JWTRules), d.RequestAuthentication.Selector
	case d.PeerAuthentication != nil:
		selector = d.PeerAuthentication.Selector
		if d.PeerAuthentication.MTLS != nil {
			e.Action = d.PeerAuthentication.MTLS.Mode
		}
	}
	switch {
	case selector != nil && len(selector.MatchLabels) > 0:
		e.Selects = "workload"
	case d.Metadata.Namespace == mesh.RootNamespace:
		e.Selects = "mesh"
	}
	return e
}

func describeTokens(r policy.JWTRule) tokenRule {
	t := tokenRule{Issuer: r.Issuer, Audiences: r.Audiences, Keys: "OpenID Connect discovery at the issuer", From: []string{}}
	switch {
	case r.Jwks != "":
		t.Keys = "in the policy"
	case r.JwksURI != "":
		t.Keys = r.JwksURI
	}
	for _, h := range r.FromHeaders {
		t.From = append(t.From, strings.TrimSpace("header "+h.Name+" "+h.Prefix))
	}
	for _, p := range r.FromParams {
		t.From = append(t.From, "parameter "+p)
	}
	for _, c := range r.FromCookies {
		t.From = append(t.From, "cookie "+c)
	}
	if len(t.From) == 0 {
		t.From = []string{"header authorization Bearer", "parameter access_token"}
	}
	return t
}

// warn collects what keeps it from being enforced as written, and what to be wary of.
func (v *workloadPolicy) warn(s *scene, what enforcement, problems []authz.Problem) {
	v.Enforced = "unknown"
	if what.known {
		v.Enforced = "yes"
	}
	not := func(reason string) {
		v.Enforced = "no"
		v.Warnings = append(v.Warnings, reason)
	}
	if !v.InMesh {
		not("no proxy stands before it: it is outside the mesh (no label security.istio.io/tlsMode=istio), and nothing here is enforced")
	}
	if what.deny != "" {
		not("everything is denied: " + what.deny)
	}
	for _, n := range what.notes {
		not(n)
	}
	for _, p := range problems {
		v.Warnings = append(v.Warnings, fmt.Sprintf("%s %s/%s: %s: %s: it fails closed", p.Kind, p.Namespace, p.Name, p.Field, p.Reason))
	}
	for _, p := range v.Policies {
		for _, f := range p.Findings {
			v.Warnings = append(v.Warnings, fmt.Sprintf("%s %s/%s: %s", p.Kind, p.Namespace, p.Name, f))
		}
	}
	if s.unasked != nil {
		v.Warnings = append(v.Warnings, "whether it is enforced could not be asked: "+s.unasked.Error())
	}
}
