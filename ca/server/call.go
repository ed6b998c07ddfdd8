package server

import (
	"context"
	"log/slog"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"

	"castellan.dev/ca/attest"
	"castellan.dev/internal/jws"
)

// Metadata that carries the credentials (trust rule 2).
const (
	authorizationHeader = "authorization"
	agentTokenHeader    = "castellan-agent-token"
	clusterHeader       = "clusterid"
	bearer              = "Bearer "

	// maxClusterID bounds what a caller says of itself.
	maxClusterID = 253
)

// kind is what is asked for: the label of metrics and audit records.
type kind string

const (
	kindX509 kind = "x509-svid"
	kindJWT  kind = "jwt-svid"
)

// call is one request for an identity on its way through attestation, limits,
// audit and metrics.
type call struct {
	s     *Server
	ctx   context.Context
	kind  kind
	start time.Time
	who   attest.Attested // zero until admitted
	id    string
}

func (s *Server) begin(ctx context.Context, k kind) *call {
	return &call{s: s, ctx: ctx, kind: k, start: s.cfg.Now()}
}

// admit attests the caller and counts it against its limits.
func (c *call) admit(impersonate string) (attest.Attested, error) {
	creds, err := readCredentials(c.ctx)
	if err != nil {
		return attest.Attested{}, err
	}
	creds.Impersonate = impersonate
	who, err := c.s.cfg.Attestor.Attest(c.ctx, creds)
	if err != nil {
		return attest.Attested{}, err
	}
	c.who, c.id = who, who.Workload.String()
	proved(c.ctx)
	if wait, scope := c.s.limiter.take(who.PodUID, c.kind, c.start); scope != "" {
		return attest.Attested{}, limited(scope, wait)
	}
	return who, nil
}

// readCredentials reads the metadata. Each header may stand once: of two, nobody
// could say which one was meant.
func readCredentials(ctx context.Context) (attest.Credentials, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	var c attest.Credentials
	for _, h := range []struct {
		name  string
		limit int
		into  *string
	}{
		// One byte more than allowed, for attest to name the reason.
		{authorizationHeader, len(bearer) + jws.MaxSize + 1, &c.WorkloadToken},
		{agentTokenHeader, jws.MaxSize + 1, &c.AgentToken},
		{clusterHeader, maxClusterID, &c.ClusterID},
	} {
		values := md[h.name]
		switch {
		case len(values) > 1:
			return c, unauthenticated("metadata", "metadata %s stands %d times", h.name, len(values))
		case len(values) == 1 && len(values[0]) > h.limit:
			return c, unauthenticated("too-large", "metadata %s has %d bytes, %d are allowed", h.name, len(values[0]), h.limit-1)
		case len(values) == 1:
			*h.into = values[0]
		}
	}
	if c.WorkloadToken != "" {
		token, ok := strings.CutPrefix(c.WorkloadToken, bearer)
		if !ok || token == "" {
			return c, unauthenticated("no-token", "metadata authorization does not begin with %q and a token", bearer)
		}
		c.WorkloadToken = token
	}
	// Older agents may send the scheme here too.
	c.AgentToken = strings.TrimPrefix(c.AgentToken, bearer)
	return c, nil
}

// requested writes the audit record before a signature.
func (c *call) requested() {
	c.s.cfg.Log.LogAttrs(c.ctx, slog.LevelInfo, "identity requested",
		slog.String("kind", string(c.kind)),
		slog.String("spiffeId", c.id),
		slog.String("podUid", c.who.PodUID),
		slog.String("node", c.who.Node),
		slog.String("cluster", c.who.Cluster),
		slog.String("attestor", c.who.Attestor))
}

// issued writes the audit record after a signature.
func (c *call) issued(what slog.Attr, notAfter time.Time) {
	c.s.metrics.issued(c.kind, c.s.cfg.Now().Sub(c.start))
	c.s.cfg.Log.LogAttrs(c.ctx, slog.LevelInfo, "identity issued",
		slog.String("kind", string(c.kind)),
		slog.String("spiffeId", c.id),
		slog.String("podUid", c.who.PodUID),
		what,
		slog.Time("notAfter", notAfter))
}

// refuse logs the cause and returns what the caller gets to see.
func (c *call) refuse(cause error) error {
	v := verdictOf(cause)
	c.s.metrics.refused(c.kind, v.reason, c.s.cfg.Now().Sub(c.start))
	var suppressed uint64
	if c.id == "" || v.code == codes.ResourceExhausted {
		// Anybody can cause these at will.
		var ok bool
		if suppressed, ok = c.s.quiet.allow(v.reason); !ok {
			return v.status()
		}
	}
	level := slog.LevelWarn
	if v.code == codes.Internal || v.code == codes.Unavailable {
		level = slog.LevelError
	}
	attrs := []slog.Attr{
		slog.String("kind", string(c.kind)),
		slog.String("code", v.code.String()),
		slog.String("reason", v.reason),
		slog.String("peer", peerAddress(c.ctx)),
		slog.Uint64("suppressed", suppressed),
	}
	if c.id != "" {
		attrs = append(attrs, slog.String("spiffeId", c.id), slog.String("podUid", c.who.PodUID),
			slog.String("node", c.who.Node), slog.String("attestor", c.who.Attestor))
	}
	c.s.cfg.Log.LogAttrs(c.ctx, level, "identity refused", append(attrs, slog.String("cause", cause.Error()))...)
	return v.status()
}

func peerAddress(ctx context.Context) string {
	if p, ok := peer.FromContext(ctx); ok && p.Addr != nil {
		return p.Addr.String()
	}
	return ""
}
