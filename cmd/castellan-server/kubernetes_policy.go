package main

import (
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"castellan.dev/api/policy"
	"castellan.dev/authz"
	"castellan.dev/discovery"
	"castellan.dev/internal/kube"
	"castellan.dev/internal/run"
	"castellan.dev/internal/telemetry"
)

// cluster is what the server follows of a Kubernetes cluster: informers for all,
// pods and services from them as the inventory, and policies as the source.
type cluster struct {
	client    *kube.Client
	informers *kube.Informers
	inventory *kube.Inventory
	source    *discovery.Objects
}

// followCluster makes all of it. Its run must be among the program's parts.
func followCluster(client *kube.Client, mesh policy.Mesh, log *slog.Logger) (*cluster, error) {
	informers, err := kube.NewInformers(kube.InformersConfig{Kubernetes: client.Kubernetes(), Dynamic: client.Dynamic(), Log: log})
	if err != nil {
		return nil, err
	}
	return &cluster{
		client: client, informers: informers,
		inventory: kube.NewInventory(kube.InventoryConfig{Informers: informers, Log: log}),
		source:    discovery.NewObjects(discovery.ObjectsConfig{Source: informers.Policies(), Mesh: mesh, Log: log}),
	}, nil
}

// parts follow the cluster.
func (c *cluster) parts() []run.Part { return []run.Part{c.informers.Run, c.inventory.Run} }

// statuses writes into policies what became of them. It is for the leader alone.
func (c *cluster) statuses(d *discovery.Server, registry prometheus.Registerer, log *slog.Logger) (run.Part, error) {
	s, err := kube.NewStatuses(kube.StatusesConfig{
		Kubernetes: c.client.Kubernetes(), Dynamic: c.client.Dynamic(), Policies: c.informers.Policies(),
		Verdicts: func() ([]kube.Verdict, <-chan struct{}) {
			all, changed := d.Statuses()
			return verdicts(all), changed
		},
		Log: log, Registerer: registry,
	})
	if err != nil {
		return nil, fmt.Errorf("kubernetes: %w", err)
	}
	return s.Run, nil
}

// checks puts what may be missing of the cluster on the admin page.
func (c *cluster) checks(admin *telemetry.Admin) {
	// Only at first: what was known last goes on being served while the API server is
	// away, to agents that would find no other server.
	admin.AddCheck("cluster", untilOnce(c.informers.Ready))
	admin.AddCheck("policies", untilOnce(c.informers.Policies().Ready))
	admin.AddNotice("apiServer", c.heard)
	// A cluster without the definitions has no policies; that is worth a word and
	// no reason to issue no certificates.
	admin.AddNotice("policyDefinitions", c.informers.Policies().Missing)
}

// untilOnce asks a check until it has held once.
func untilOnce(check func() error) func() error {
	var held atomic.Bool
	return func() error {
		if held.Load() {
			return nil
		}
		err := check()
		if err == nil {
			held.Store(true)
		}
		return err
	}
}

// unheard is after how long without a word from the API server its absence is told:
// an idle watch is opened anew sooner.
const unheard = 5 * time.Minute

// heard says since when the API server has not been.
func (c *cluster) heard() error {
	last := c.informers.LastContact()
	if last.IsZero() {
		return errors.New("the API server has not been heard yet")
	}
	if age := time.Since(last); age > unheard {
		return fmt.Errorf("the API server has not been heard for %v; pods known then are served for ten minutes in all", age.Truncate(time.Second))
	}
	return nil
}

// verdicts says for the cluster what discovery says; nil stays nil.
func verdicts(all []discovery.DocumentStatus) []kube.Verdict {
	if all == nil {
		return nil
	}
	out := make([]kube.Verdict, len(all))
	for i := range all {
		s := &all[i]
		out[i] = kube.Verdict{
			Kind: s.Kind, Namespace: s.Namespace, Name: s.Name, UID: s.UID, Generation: s.Generation,
			Accepted: s.Accepted, LastGood: s.LastGoodInForce, Denies: s.Denies,
			Selected: s.Selected, Programmed: s.Programmed, Refused: s.Refused,
		}
		for _, f := range s.Findings {
			line := f.Field + ": " + f.Reason
			if f.Value != "" {
				line = fmt.Sprintf("%s: %q: %s", f.Field, f.Value, f.Reason)
			}
			if f.Severity == authz.SeverityError {
				out[i].Errors = append(out[i].Errors, line)
			} else {
				out[i].Warnings = append(out[i].Warnings, line)
			}
		}
	}
	return out
}
