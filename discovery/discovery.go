// Package discovery turns policy documents and declared workloads and services
// into the castellan.v1 resources that agents, and through them proxies, follow.
//
// It admits a document only if it is valid; else that document's last good
// version stays in force, across restarts too, and where there is none every
// workload it could select denies all. It shows an agent the policy of its own
// node's workloads and no other. It assumes that the source has been decided on
// by whoever may set policy, and that TLS has verified the agent's certificate.
package discovery

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	castellanv1 "castellan.dev/api/castellan/v1"
	"castellan.dev/api/policy"
	"castellan.dev/identity"
	"castellan.dev/internal/workloads"
)

// Source gives the policy documents as they are now, and a channel that is closed
// at their next change. Nil documents mean that nothing is known yet.
type Source interface {
	Documents() ([]FileDocument, <-chan struct{})
}

// Inventory says which workloads and services there are; *workloads.Watcher is one.
type Inventory interface {
	Current() *workloads.File
	Changed() <-chan struct{}
}

// ErrUnknownNode is what NodeOf wraps when the certificate is of no node that is known.
var ErrUnknownNode = errors.New("certificate belongs to no known node")

// Config configures a Server.
type Config struct {
	// Source of policy; nil means that there is no policy.
	Source Source
	// Workloads and services; nil means none.
	Workloads   Inventory
	Mesh        policy.Mesh
	TrustDomain spiffeid.TrustDomain
	// Bundle gives the trust domain's bundle as it is now and a channel that is closed at its next change.
	Bundle func() (*castellanv1.Bundle, <-chan struct{})
	// LastGoodDir keeps the last good version of every document; made 0700.
	LastGoodDir string
	// Agents are the accounts whose certificate may follow a node's resources; none admits nobody.
	Agents []identity.Account
	// NodeOf names the node that an agent's certificate, by serial in lower-case
	// hex without leading zeros, was issued to. An error that is not ErrUnknownNode
	// is taken for the ledger being away.
	NodeOf     func(ctx context.Context, serial string) (string, error)
	Log        *slog.Logger
	Registerer prometheus.Registerer
	Now        func() time.Time
}
