package authz

import (
	"fmt"
	"slices"
	"strings"

	"castellan.dev/api/policy"
	"castellan.dev/identity"
)

// Severities of a Finding.
const (
	SeverityError   = "error"
	SeverityWarning = "warning"
)

// annotationDryRun makes a policy a shadow, whose decision is only reported (rule 23).
const annotationDryRun = "istio.io/dry-run"

// Limits of the documents (rules 2, 13, 35 and the schemas that users' tools know).
const (
	maxRules           = 512
	maxTargetRefs      = 16
	maxServiceAccounts = 16
	maxJWTRules        = 4096
	maxSpaceDelimited  = 64
	maxJwksURI         = 2048
	maxJwks            = 64 << 10
	maxLabelValue      = 63
)

// maxFindings of each severity are listed of a document; of the others there is one
// more that counts them. Errors never stand behind warnings.
const maxFindings = 100

// Finding is one thing to say about a document: an error, for which it is not
// admitted, or a warning about what is legal but risky.
type Finding struct {
	Severity string `json:"severity"`
	// Field is a path as in "spec.rules[0].from[1].source.principals[0]".
	Field string `json:"field"`
	// Value is what was refused, shortened; empty where the field as a whole is meant.
	Value string `json:"value,omitempty"`
	// Reason says what is wrong, what it would do, and what is allowed instead.
	Reason string `json:"reason"`
	// More is how many findings of this severity this one stands for that are not
	// listed; 0 for a finding of its own.
	More int `json:"more,omitempty"`
}

// String returns one line.
func (f Finding) String() string {
	if f.Value == "" {
		return fmt.Sprintf("%s: %s: %s", f.Severity, f.Field, f.Reason)
	}
	return fmt.Sprintf("%s: %s: %q: %s", f.Severity, f.Field, f.Value, f.Reason)
}

// Validate says what is wrong with a document under the given mesh settings, in
// the order of its fields. A document with an error is not admitted: that is
// everything the engine could not represent, and everything that the rules (docs/conformance.md)
// call invalid. What nobody declared is not assumed: without the ports of a
// workload it warns of every rule that a TCP port would read otherwise than an
// HTTP port does.
func Validate(doc policy.Document, mesh policy.Mesh) []Finding { return ValidateFor(doc, mesh, nil) }

// ValidateFor is Validate for a workload whose ports declare their protocols, by
// workload port: it warns of HTTP fields only where such a port is known to be TCP.
func ValidateFor(doc policy.Document, mesh policy.Mesh, ports map[uint16]string) []Finding {
	if ports == nil {
		return validate(doc, mesh, nil, false)
	}
	return validate(doc, mesh, tcpPorts(ports), true)
}

// MaxPortSets bounds how many different declarations of ports a document is looked
// at with, and MaxPorts how many ports one of them may have. Who creates pods and
// services chooses how many there are.
const (
	MaxPortSets = 8
	MaxPorts    = 256
)

// ValidateForAll is ValidateFor for every workload that a document selects, by what
// each declares of its ports: it says at once what is to be said for any of them.
// Where none is selected, where one says nothing about a port and where they or
// their ports are too many, it is as if nobody had declared any.
func ValidateForAll(doc policy.Document, mesh policy.Mesh, ports []map[uint16]string) []Finding {
	if len(ports) == 0 || len(ports) > MaxPortSets || slices.ContainsFunc(ports, undeclared) {
		return Validate(doc, mesh)
	}
	tcp := tcpPorts(ports...)
	if len(tcp) > MaxPorts {
		return Validate(doc, mesh)
	}
	return validate(doc, mesh, tcp, true)
}

func validate(doc policy.Document, mesh policy.Mesh, tcp ports, declared bool) []Finding {
	v := &validation{mesh: mesh, namespace: doc.Metadata.Namespace, own: newDomains(mesh, ""), declared: declared, tcp: tcp}
	v.metadata(doc)
	switch {
	case doc.Kind == policy.KindAuthorization && doc.Authorization != nil:
		v.authorization(doc.Authorization)
	case doc.Kind == policy.KindRequestAuthentication && doc.RequestAuthentication != nil:
		v.requestAuthentication(doc.RequestAuthentication)
	case doc.Kind == policy.KindPeerAuthentication && doc.PeerAuthentication != nil:
		v.peerAuthentication(doc.PeerAuthentication)
	default:
		v.refuse("kind", doc.Kind, "no spec of this kind; allowed: %s, %s, %s",
			policy.KindAuthorization, policy.KindRequestAuthentication, policy.KindPeerAuthentication)
	}
	return v.all()
}

func undeclared(ports map[uint16]string) bool {
	for _, protocol := range ports {
		if protocol == "" {
			return true
		}
	}
	return len(ports) == 0 || len(ports) > MaxPorts
}

// validation collects findings about one document.
type validation struct {
	mesh      policy.Mesh
	namespace string
	own       domains
	// declared: it is known which ports there are, and tcp are those that are not HTTP.
	declared bool
	tcp      ports
	findings []Finding
	// errors and warnings there were, listed or not.
	errors, warnings int
}

func (v *validation) refuse(field, value, format string, args ...any) {
	if v.errors++; v.errors <= maxFindings {
		v.add(SeverityError, field, value, fmt.Sprintf(format, args...))
	}
}

func (v *validation) warn(field, value, format string, args ...any) {
	if v.warnings++; v.warnings <= maxFindings {
		v.add(SeverityWarning, field, value, fmt.Sprintf(format, args...))
	}
}

func (v *validation) add(severity, field, value, reason string) {
	v.findings = append(v.findings, Finding{Severity: severity, Field: field, Value: shorten(value), Reason: reason})
}

// all is what there is to say, and how much more there would be.
func (v *validation) all() []Finding {
	if more := v.errors - maxFindings; more > 0 {
		v.findings = append(v.findings, Finding{Severity: SeverityError, Field: "document", Reason: fmt.Sprintf("and %d more errors", more), More: more})
	}
	if more := v.warnings - maxFindings; more > 0 {
		v.findings = append(v.findings, Finding{Severity: SeverityWarning, Field: "document", Reason: fmt.Sprintf("and %d more warnings", more), More: more})
	}
	return v.findings
}

func (v *validation) rootNamespace() string { return rootNamespace(v.mesh) }

// domains are what the mesh's identities may be called.
func (v *validation) domains() domains { return v.own }

func (v *validation) metadata(doc policy.Document) {
	meta := doc.Metadata
	if !validSubdomain(meta.Name) {
		v.refuse("metadata.name", meta.Name, "an RFC 1123 subdomain is wanted")
	}
	if meta.Namespace == "" {
		v.refuse("metadata.namespace", "", "required: a policy without a namespace would select nobody knows what")
	} else if !validLabelName(meta.Namespace) {
		v.refuse("metadata.namespace", meta.Namespace, "an RFC 1123 label is wanted")
	}
	v.dryRun(doc)
}

// dryRun is rule 23.
func (v *validation) dryRun(doc policy.Document) {
	value, given := doc.Metadata.Annotations[annotationDryRun]
	if !given {
		return
	}
	field := childPath("metadata.annotations", annotationDryRun)
	switch {
	case doc.Authorization == nil:
		v.refuse(field, value, "only an AuthorizationPolicy can be tried out; a %s would be enforced all the same", doc.Kind)
	case value != "true":
		v.refuse(field, value, `allowed: "true"; remove the annotation to enforce the policy`)
	case doc.Authorization.Action == policy.ActionCustom || doc.Authorization.Action == policy.ActionAudit:
		v.refuse(field, value, "not with action %s; allowed with: ALLOW, DENY", doc.Authorization.Action)
	}
}

// selection checks what picks the workloads (rule 2).
func (v *validation) selection(selector *policy.Selector, ref *policy.TargetRef, refs []policy.TargetRef) {
	given := 0
	for _, is := range []bool{selector != nil, ref != nil, len(refs) > 0} {
		if is {
			given++
		}
	}
	if given > 1 {
		v.refuse("spec", "", "only one of selector, targetRef and targetRefs may be given")
	}
	v.selector(selector)
	if ref != nil {
		v.targetRef("spec.targetRef", *ref)
	}
	if len(refs) > maxTargetRefs {
		v.refuse("spec.targetRefs", "", "%d references, at most %d are allowed", len(refs), maxTargetRefs)
		refs = refs[:maxTargetRefs]
	}
	for i, r := range refs {
		v.targetRef(itemPath("spec.targetRefs", i), r)
	}
	if ref != nil || len(refs) > 0 {
		v.warn("spec", "", "sidecars ignore a policy with a target reference: no castellan-proxy enforces this one")
	}
}

func (v *validation) selector(s *policy.Selector) {
	if s == nil {
		return
	}
	if len(s.MatchLabels) == 0 {
		v.warn("spec.selector", "", "an empty selector selects every workload of its scope; leave selector out if that is meant")
	}
	if n := len(s.MatchLabels); n > maxLabels {
		v.refuse("spec.selector.matchLabels", "", "%d labels, at most %d are allowed", n, maxLabels)
		return
	}
	for _, key := range sortedKeys(s.MatchLabels) {
		value := s.MatchLabels[key]
		field := childPath("spec.selector.matchLabels", key)
		switch {
		case key == "":
			v.refuse("spec.selector.matchLabels", "", "a label key must not be empty")
		case strings.Contains(key, "*"):
			v.refuse(field, key, "no wildcard is allowed in a label key")
		case strings.Contains(value, "*"):
			v.refuse(field, value, "no wildcard is allowed in a label value")
		case len(value) > maxLabelValue:
			v.refuse(field, value, "%d bytes long, a label value has at most %d", len(value), maxLabelValue)
		}
	}
}

// targetKinds are the kinds a policy may point at, by API group.
var targetKinds = [...][2]string{
	{"gateway.networking.k8s.io", "Gateway"},
	{"gateway.networking.k8s.io", "GatewayClass"},
	{"", "Service"},
	{"networking.istio.io", "ServiceEntry"},
}

func (v *validation) targetRef(field string, ref policy.TargetRef) {
	group := ref.Group
	if group == "core" {
		group = ""
	}
	switch {
	case !slices.Contains(targetKinds[:], [2]string{group, ref.Kind}):
		v.refuse(field, ref.Group+"/"+ref.Kind, "allowed: gateway.networking.k8s.io/Gateway, gateway.networking.k8s.io/GatewayClass, core/Service, networking.istio.io/ServiceEntry")
	case ref.Kind == "GatewayClass" && v.namespace != v.rootNamespace():
		v.refuse(field, ref.Kind, "a GatewayClass may be targeted from the root namespace %q only", v.rootNamespace())
	}
	if ref.Name == "" {
		v.refuse(field+".name", "", "required")
	}
	if ref.Namespace != "" && ref.Namespace != v.namespace {
		v.refuse(field+".namespace", ref.Namespace, "a reference across namespaces is not allowed; leave it out or give %q", v.namespace)
	}
}

// validSubdomain and validLabelName borrow identity's grammar, which is
// Kubernetes' for names.
func validSubdomain(name string) bool {
	_, err := identity.NewAccount("n", name)
	return err == nil
}

func validLabelName(name string) bool {
	_, err := identity.NewAccount(name, "n")
	return err == nil
}
