package config

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"time"

	"castellan.dev/api/policy"
	"castellan.dev/identity"
)

// Server configures castellan-server.
type Server struct {
	Header `json:",inline"`

	// DataDir holds keys, ledger and last good policies; made 0700.
	DataDir string `json:"dataDir"`
	// Listen is the host:port of the gRPC services; default ":15012".
	Listen string `json:"listen,omitempty"`
	// HTTP is the host:port of /livez, /readyz, /metrics and the published keys; default ":15014".
	HTTP string `json:"http,omitempty"`
	// AdminSocket is the Unix socket of the operator's services; default DATADIR/admin.sock.
	AdminSocket string `json:"adminSocket,omitempty"`
	// BundleFile, if set, is where the roots are written as PEM, replaced atomically.
	BundleFile string `json:"bundleFile,omitempty"`
	// ServingNames are DNS names and IP addresses of the server's own certificate;
	// default castellan-server.NAMESPACE.svc (castellan-system off Kubernetes),
	// localhost, 127.0.0.1 and ::1.
	ServingNames []string `json:"servingNames,omitempty"`

	CA          CA          `json:"ca,omitzero"`
	Attestation Attestation `json:"attestation"`
	RateLimit   RateLimit   `json:"rateLimit,omitzero"`
	Discovery   Discovery   `json:"discovery,omitzero"`
	// Kubernetes, if set, takes the place of the workloads file and the policy directory.
	Kubernetes *Kubernetes `json:"kubernetes,omitempty"`
	// Webhook, if set, serves admission; it needs Kubernetes.
	Webhook *Webhook    `json:"webhook,omitempty"`
	Mesh    policy.Mesh `json:"mesh,omitzero"`
	Log     Log         `json:"log,omitzero"`
}

// CA configures certificates and their lifetimes (trust rule 10).
type CA struct {
	LeafTTL         Duration `json:"leafTTL,omitempty"`         // default 1h
	MaxLeafTTL      Duration `json:"maxLeafTTL,omitempty"`      // default 24h
	IntermediateTTL Duration `json:"intermediateTTL,omitempty"` // default 7d
	RootTTL         Duration `json:"rootTTL,omitempty"`         // default 1y
	Backdate        Duration `json:"backdate,omitempty"`        // default 30s, at most a tenth of the TTL
	JWTTTL          Duration `json:"jwtTTL,omitempty"`          // default 5m
	// JWTIssuer is the iss claim of JWT-SVIDs; empty leaves it out.
	JWTIssuer string `json:"jwtIssuer,omitempty"`
	// PermittedURI adds the trust domain as a permitted URI name constraint, which some verifiers cannot take.
	PermittedURI bool `json:"permittedURI,omitempty"`
	// ChainDir holds a plugged-in chain in Istio's cacerts file names; empty: self-signed.
	ChainDir string `json:"chainDir,omitempty"`
	// AllowUnconstrainedIssuer accepts a plugged-in chain without name constraints.
	AllowUnconstrainedIssuer bool `json:"allowUnconstrainedIssuer,omitempty"`
}

// Attestation says whose tokens prove what.
type Attestation struct {
	Issuers []TokenIssuer `json:"issuers"`
	// AgentAccounts are the accounts ("namespace/name") whose token proves a node; default castellan-agent in
	// the server's namespace (castellan-system off Kubernetes).
	AgentAccounts []string `json:"agentAccounts,omitempty"`
	// DirectCallers may ask without an agent token; default none.
	DirectCallers []string `json:"directCallers,omitempty"`
	// TrustedNodeAccounts may impersonate pods of their node; default none.
	TrustedNodeAccounts []string `json:"trustedNodeAccounts,omitempty"`
	// WorkloadsFile answers for pods and nodes off Kubernetes, and declares services.
	WorkloadsFile string `json:"workloadsFile,omitempty"`
}

// TokenIssuer is one issuer of workload tokens. Exactly one of JWKSFile, JWKSURI
// and OIDC (discovery at the issuer's own URL) is set.
type TokenIssuer struct {
	Issuer    string   `json:"issuer"`
	Audiences []string `json:"audiences,omitempty"` // default castellan.dev, istio-ca
	// Cluster is what callers name in the clusterid metadata; default "Kubernetes".
	Cluster  string `json:"cluster,omitempty"`
	JWKSFile string `json:"jwksFile,omitempty"`
	JWKSURI  string `json:"jwksUri,omitempty"`
	OIDC     bool   `json:"oidc,omitempty"`
	// CAFile holds PEM roots for fetching over https; empty: the system's.
	CAFile string `json:"caFile,omitempty"`
	// InsecureAllowHTTP permits plain http, for tests and loopback.
	InsecureAllowHTTP bool `json:"insecureAllowHTTP,omitempty"`
}

// RateLimit bounds signing: token buckets per attested pod and overall.
type RateLimit struct {
	PodBurst       int     `json:"podBurst,omitempty"`       // default 100
	PodPerSecond   float64 `json:"podPerSecond,omitempty"`   // default 2
	TotalBurst     int     `json:"totalBurst,omitempty"`     // default 20000
	TotalPerSecond float64 `json:"totalPerSecond,omitempty"` // default 5000
}

// Discovery says where policy comes from.
type Discovery struct {
	// PolicyDir is a watched directory of YAML documents.
	PolicyDir string `json:"policyDir,omitempty"`
}

const day = 24 * time.Hour

// setDefaults fills what was left out; CheckMesh does so for the mesh.
func (s *Server) setDefaults() {
	setDefault(&s.Listen, ":15012")
	setDefault(&s.HTTP, ":15014")
	setDefault(&s.AdminSocket, filepath.Join(s.DataDir, "admin.sock"))
	c := &s.CA
	setDefault(&c.LeafTTL, Duration(time.Hour))
	setDefault(&c.MaxLeafTTL, Duration(day))
	setDefault(&c.IntermediateTTL, Duration(7*day))
	setDefault(&c.RootTTL, Duration(365*day))
	setDefault(&c.Backdate, Duration(30*time.Second))
	setDefault(&c.JWTTTL, Duration(5*time.Minute))
	setDefault(&s.RateLimit.PodBurst, 100)
	setDefault(&s.RateLimit.PodPerSecond, 2)
	setDefault(&s.RateLimit.TotalBurst, 20000)
	setDefault(&s.RateLimit.TotalPerSecond, 5000)
	if s.Kubernetes != nil {
		s.Kubernetes.setDefaults()
	}
	if s.Webhook != nil {
		s.Webhook.setDefaults()
	}
	namespace := "castellan-system"
	if s.Kubernetes != nil {
		namespace = s.Kubernetes.Namespace
	}
	if len(s.ServingNames) == 0 {
		s.ServingNames = []string{"castellan-server." + namespace + ".svc", "localhost", "127.0.0.1", "::1"}
	}
	if len(s.Attestation.AgentAccounts) == 0 {
		s.Attestation.AgentAccounts = []string{namespace + "/castellan-agent"}
	}
	for i := range s.Attestation.Issuers {
		t := &s.Attestation.Issuers[i]
		setDefault(&t.Cluster, "Kubernetes")
		if len(t.Audiences) == 0 {
			t.Audiences = []string{"castellan.dev", "istio-ca"}
		}
	}
}

func setDefault[T comparable](v *T, def T) {
	var zero T
	if *v == zero {
		*v = def
	}
}

// Validate fills defaults and checks everything that can be checked without
// opening anything. It names the field to change.
func (s *Server) Validate() error {
	if err := s.check("ServerConfig"); err != nil {
		return err
	}
	s.setDefaults()
	if s.DataDir == "" {
		return errors.New("dataDir: required")
	}
	if err := CheckMesh(&s.Mesh); err != nil {
		return fmt.Errorf("mesh.%w", err)
	}
	for _, a := range []struct{ field, value string }{{"listen", s.Listen}, {"http", s.HTTP}} {
		if _, _, err := net.SplitHostPort(a.value); err != nil {
			return fmt.Errorf("%s: %w", a.field, err)
		}
	}
	if err := CheckSocketPath(s.AdminSocket); err != nil {
		return fmt.Errorf("adminSocket: %w", err)
	}
	if err := s.CA.validate(); err != nil {
		return err
	}
	if err := s.checkSources(); err != nil {
		return err
	}
	if err := s.Attestation.validate(s.Kubernetes != nil); err != nil {
		return err
	}
	if r := s.RateLimit; r.PodBurst < 0 || r.PodPerSecond < 0 || r.TotalBurst < 0 || r.TotalPerSecond < 0 {
		return errors.New("rateLimit: limits must not be negative")
	}
	if err := s.checkWebhook(); err != nil {
		return err
	}
	return s.Log.validate()
}

// validate holds trust rule 10: leaf < intermediate < root, with room to rotate.
func (c CA) validate() error {
	leaf, maxLeaf := time.Duration(c.LeafTTL), time.Duration(c.MaxLeafTTL)
	inter, root := time.Duration(c.IntermediateTTL), time.Duration(c.RootTTL)
	switch {
	case leaf < 5*time.Second:
		return fmt.Errorf("ca.leafTTL: %v is shorter than 5s", leaf)
	case maxLeaf < leaf:
		return fmt.Errorf("ca.maxLeafTTL: %v is shorter than ca.leafTTL (%v)", maxLeaf, leaf)
	case maxLeaf > day:
		return fmt.Errorf("ca.maxLeafTTL: %v is longer than 24h", maxLeaf)
	case inter/2 < maxLeaf: // divided, as a product may overflow
		return fmt.Errorf("ca.intermediateTTL: %v must be at least twice ca.maxLeafTTL (%v), so that it can be rotated", inter, maxLeaf)
	case root/2 < inter:
		return fmt.Errorf("ca.rootTTL: %v must be at least twice ca.intermediateTTL (%v), so that it can be rotated", root, inter)
	case time.Duration(c.JWTTTL) > maxLeaf:
		return fmt.Errorf("ca.jwtTTL: %v is longer than ca.maxLeafTTL (%v)", time.Duration(c.JWTTTL), maxLeaf)
	case c.Backdate < 0 || c.JWTTTL < 0:
		return errors.New("ca: durations must not be negative")
	}
	return nil
}

// validate: on Kubernetes the cluster's own issuer needs no line.
func (a Attestation) validate(kubernetes bool) error {
	if len(a.Issuers) == 0 && !kubernetes {
		return errors.New("attestation.issuers: at least one is needed; without it nobody can be attested")
	}
	seen := map[string]bool{}
	for i, t := range a.Issuers {
		field := fmt.Sprintf("attestation.issuers[%d]", i)
		if t.Issuer == "" {
			return fmt.Errorf("%s.issuer: required", field)
		}
		if seen[t.Issuer] {
			return fmt.Errorf("%s.issuer: %q is listed twice", field, t.Issuer)
		}
		seen[t.Issuer] = true
		n := 0
		for _, set := range []bool{t.JWKSFile != "", t.JWKSURI != "", t.OIDC} {
			if set {
				n++
			}
		}
		if n != 1 {
			return fmt.Errorf("%s: set exactly one of jwksFile, jwksUri and oidc", field)
		}
	}
	for _, l := range []struct {
		field string
		list  []string
	}{{"agentAccounts", a.AgentAccounts}, {"directCallers", a.DirectCallers}, {"trustedNodeAccounts", a.TrustedNodeAccounts}} {
		for i, v := range l.list {
			if _, err := identity.ParseAccount(v); err != nil {
				return fmt.Errorf("attestation.%s[%d]: %w", l.field, i, err)
			}
		}
	}
	return nil
}

// ServingHosts splits ServingNames into DNS names and addresses.
func (s *Server) ServingHosts() (names []string, ips []netip.Addr) {
	for _, n := range s.ServingNames {
		if ip, err := netip.ParseAddr(n); err == nil {
			ips = append(ips, ip)
		} else {
			names = append(names, n)
		}
	}
	return names, ips
}
