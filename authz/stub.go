package authz

import "castellan.dev/api/policy"

// Snapshot is policy compiled for one workload; immutable.
type Snapshot struct{}

// Connection is a Snapshot with all evaluated that one connection fixes.
type Connection struct{}

// Claims are those of a verified token, prepared for matching; immutable.
type Claims struct{}

// Compile never fails: what cannot be represented fails closed and is a Problem.
func Compile(Config) (*Snapshot, []Problem) { return nil, nil }

// Selects says whether a document applies to a workload of the given namespace and labels.
func Selects(doc policy.Document, namespace string, labels map[string]string, mesh policy.Mesh) bool {
	return false
}

// Connect evaluates what the connection fixes.
func (s *Snapshot) Connect(p Peer) *Connection { return nil }

// HasHTTPRules says whether any policy may decide about HTTP requests.
func (s *Snapshot) HasHTTPRules() bool { return true }

// MTLSMode returns the mode of a workload port.
func (s *Snapshot) MTLSMode(port uint16) Mode { return ModeStrict }

// JWTRules returns the pooled rules.
func (s *Snapshot) JWTRules() []policy.JWTRule { return nil }

// NewClaims prepares the claims of a verified token.
func NewClaims(payload map[string]any, issuer string, spaceDelimited []string) *Claims { return nil }

// Authorize decides about a request.
func (c *Connection) Authorize(r *Request) Decision { return Decision{Rule: -1} }

// AuthorizePastCustom decides as Authorize does, CUSTOM policies left out: for
// when their provider has agreed.
func (c *Connection) AuthorizePastCustom(r *Request) Decision { return Decision{Rule: -1} }

// AuthorizeTCP decides about a connection that is not HTTP.
func (c *Connection) AuthorizeTCP() Decision { return Decision{Rule: -1} }

// AuthorizeTCPPastCustom is to AuthorizeTCP what AuthorizePastCustom is to Authorize.
func (c *Connection) AuthorizeTCPPastCustom() Decision { return Decision{Rule: -1} }

// NormalizePath normalises a request's path.
func NormalizePath(option, rawPath string) (string, error) { return rawPath, nil }
