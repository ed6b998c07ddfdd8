package authz

import (
	"net/netip"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"castellan.dev/api/policy"
	"castellan.dev/identity"
)

// Workload is whom a Snapshot protects.
type Workload struct {
	TrustDomain spiffeid.TrustDomain
	Account     identity.Account
	Labels      map[string]string
	// Ports holds the declared protocol by workload port.
	Ports map[uint16]string
}

// Config is what Compile reads. Documents that do not select the workload are
// passed over.
type Config struct {
	Documents []policy.Document
	Workload  Workload
	Mesh      policy.Mesh
	// DenyAll, where not empty, denies everything and is the reason given.
	DenyAll string
}

// Problem is something of a document that the engine cannot represent, and
// which therefore fails closed.
type Problem struct {
	Kind      string `json:"kind"`
	Namespace string `json:"namespace,omitempty"`
	Name      string `json:"name"`
	// Field is the path within the document, as in spec.rules[0].from[1].source.ipBlocks[0].
	Field  string `json:"field"`
	Value  string `json:"value,omitempty"`
	Reason string `json:"reason"`
}

// Peer is what a connection fixes.
type Peer struct {
	// ID is the peer's verified identity; the zero ID for plaintext.
	ID spiffeid.ID
	// SourceIP is the packet's source.
	SourceIP      netip.Addr
	DestinationIP netip.Addr
	// DestinationPort is the workload's port.
	DestinationPort uint16
	SNI             string
	// RemoteIP is the original client's address as a trusted proxy told it (PROXY
	// protocol); the zero value means SourceIP.
	RemoteIP netip.Addr
}

// Header gives the values of a request header by its lower-case name. An
// implementation on a request path should not allocate; the engine asks only for
// headers that policies name.
type Header interface {
	Values(name string) []string
}

// Request is one HTTP request. The engine neither keeps nor changes it.
type Request struct {
	Method string
	// Host is the authority as received, port included.
	Host string
	// Path is normalised and has no query.
	Path   string
	Header Header
	// RemoteIP is the original client's address as trusted proxies told it; the
	// zero value means that of the connection.
	RemoteIP netip.Addr
	// Claims are those of the verified end-user token; nil where there is none.
	Claims *Claims
}

// Decision is the answer. With Action CUSTOM and a Provider, the caller asks that
// provider and, if it agrees, takes the answer of AuthorizePastCustom; one who
// cannot ask takes the decision as it stands, which is denial.
type Decision struct {
	Allowed bool
	// Action is that of the policy that decided: DENY, ALLOW, CUSTOM; empty where
	// none did.
	Action string
	// Policy is "namespace/name" of the policy that decided, or empty.
	Policy string
	// Rule is the index of the rule in that policy, -1 where none matched.
	Rule int
	// Reason is constant text for logs and explanations, never for peers.
	Reason string
	// Provider is whom to ask; empty where it is unknown and denial is final.
	Provider string
	// Shadow is what would be decided if the dry-run policies were enforced along
	// with the rest; nil where there are none.
	Shadow *Shadow
}

// Shadow is a decision that was not enforced.
type Shadow struct {
	Allowed  bool
	Action   string
	Policy   string
	Rule     int
	Reason   string
	Provider string
}

// Reasons of decisions.
const (
	ReasonNoSnapshot       = "no policy received yet"
	ReasonDenied           = "denied by rule"
	ReasonAllowed          = "allowed by rule"
	ReasonNoAllowPolicy    = "no ALLOW policy"
	ReasonNoMatch          = "no ALLOW rule matches"
	ReasonCustom           = "custom"
	ReasonCustomUnresolved = "custom provider unresolved"
)

// Mode is a mode of mutual TLS. The zero value is the strictest.
type Mode uint8

// Modes of mutual TLS.
const (
	ModeStrict Mode = iota
	ModePermissive
	ModeDisable
)

// String returns the mode as policies write it.
func (m Mode) String() string {
	switch m {
	case ModePermissive:
		return policy.ModePermissive
	case ModeDisable:
		return policy.ModeDisable
	default:
		return policy.ModeStrict
	}
}
