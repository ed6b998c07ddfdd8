package cli

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	castellanv1 "castellan.dev/api/castellan/v1"
)

// States of a proxy, the worst first.
const (
	proxyNacked  = "NACKED"      // it refused what it was sent
	proxyDenies  = "DENIES"      // it denies everything, because of a refused policy
	proxyExpired = "EXPIRED"     // its certificate has
	proxyAway    = "AWAY"        // no proxy follows this workload's policy
	proxyStale   = "STALE"       // it has not acknowledged the version that is offered
	proxyUncert  = "UNCERTIFIED" // the agent has no certificate for it
	proxySynced  = "SYNCED"
)

// proxyView is one proxy: who it is, and how far it follows the server.
type proxyView struct {
	Namespace      string `json:"namespace"`
	Pod            string `json:"pod,omitempty"`
	PodUID         string `json:"podUID"`
	Node           string `json:"node"`
	ServiceAccount string `json:"serviceAccount"`
	SPIFFEID       string `json:"spiffeId,omitempty"`
	// Serial and NotAfter are of the certificate served now.
	Serial   string     `json:"serial,omitempty"`
	NotAfter *time.Time `json:"notAfter,omitempty"`
	// Offered and Acknowledged are versions of the workload's policy; of several
	// streams, Acknowledged is one that is behind, if any is.
	Offered      string `json:"offered"`
	Acknowledged string `json:"acknowledged,omitempty"`
	State        string `json:"state"`
	Reason       string `json:"reason,omitempty"`
}

func (p *proxyView) ok() bool { return p.State == proxySynced }

// name is the pod, or where there are no names the account.
func (p *proxyView) name() string {
	return p.Namespace + "/" + cmp.Or(p.Pod, p.ServiceAccount)
}

// proxies asks the server for every proxy, sorted by name.
func proxies(ctx context.Context, conn *admin) ([]proxyView, error) {
	authority, err := castellanv1.NewAuthorityAdminClient(conn).Status(ctx, &castellanv1.AuthorityStatusRequest{})
	if err != nil {
		return nil, conn.failed(err)
	}
	resp, err := castellanv1.NewDiscoveryAdminClient(conn).Policies(ctx, &castellanv1.PoliciesRequest{})
	if err != nil {
		return nil, conn.failed(err)
	}
	now := time.Now() //nolint:forbidigo // a command line reads the real clock
	views := make([]proxyView, 0, len(resp.GetWorkloads()))
	for _, w := range resp.GetWorkloads() {
		if w.GetVersion() == "" {
			continue // outside the mesh: there is no proxy
		}
		views = append(views, viewProxy(w, authority.GetTrustDomain(), now))
	}
	slices.SortFunc(views, func(a, b proxyView) int {
		return cmp.Or(cmp.Compare(a.name(), b.name()), cmp.Compare(a.PodUID, b.PodUID))
	})
	return views, nil
}

func viewProxy(w *castellanv1.WorkloadStatus, trustDomain string, now time.Time) proxyView {
	v := proxyView{
		Namespace: w.GetNamespace(), Pod: w.GetPodName(), PodUID: w.GetPodUid(), Node: w.GetNode(),
		ServiceAccount: w.GetServiceAccount(), Offered: w.GetVersion(), Serial: w.GetReport().GetSerial(),
		SPIFFEID: "spiffe://" + trustDomain + "/ns/" + w.GetNamespace() + "/sa/" + w.GetServiceAccount(),
	}
	if at := w.GetReport().GetNotAfter(); at != nil {
		when := at.AsTime()
		v.NotAfter = &when
	}
	v.State, v.Reason = v.judge(w, now)
	return v
}

// judge finds the worst there is to say.
func (p *proxyView) judge(w *castellanv1.WorkloadStatus, now time.Time) (state, reason string) {
	follows := false
	for _, s := range w.GetReport().GetStreams() {
		for _, r := range s.GetResources() {
			kind := r.GetTypeUrl()[strings.LastIndexByte(r.GetTypeUrl(), '.')+1:]
			if r.GetNacked() != "" && state == "" {
				state, reason = proxyNacked, fmt.Sprintf("%s %s: %s", kind, shortVersion(r.GetNacked()), r.GetReason())
			}
			if r.GetTypeUrl() == castellanv1.TypeWorkloadPolicy {
				if !follows || r.GetAcked() != p.Offered {
					p.Acknowledged = r.GetAcked()
				}
				follows = true
			}
		}
	}
	switch {
	case state != "":
		return state, reason
	case w.GetDenyAll():
		return proxyDenies, w.GetDenyReason()
	case p.NotAfter != nil && !now.Before(*p.NotAfter):
		return proxyExpired, fmt.Sprintf("%s ago; read the agent's log", humanDuration(now.Sub(*p.NotAfter)))
	case !follows && w.GetReport() == nil:
		return proxyAway, "its agent has not reported it; does the agent on " + orDash(w.GetNode()) + " run?"
	case !follows:
		return proxyAway, "no proxy is connected to its agent"
	case p.Acknowledged != p.Offered:
		return proxyStale, "offered " + shortVersion(p.Offered) + ", has " + orDash(shortVersion(p.Acknowledged))
	case p.Serial == "":
		return proxyUncert, "its agent has no certificate for it; read the agent's log"
	}
	return proxySynced, ""
}

// shortVersion is enough of a version, which is a hash, to tell it from others.
func shortVersion(v string) string { return v[:min(len(v), 12)] }

// cells are the row of a table.
func (p *proxyView) cells(now time.Time) []string {
	left := "-"
	if p.NotAfter != nil {
		left = humanDuration(p.NotAfter.Sub(now))
	}
	policy := shortVersion(p.Offered)
	if p.Acknowledged != p.Offered {
		policy += " (has " + orDash(shortVersion(p.Acknowledged)) + ")"
	}
	return []string{
		visible(p.name()), orDash(visible(p.Node)), visible(p.Namespace + "/" + p.ServiceAccount), orDash(visible(p.Serial)), left,
		visible(policy), p.State, visible(p.Reason),
	}
}

func proxyHeader() []string {
	return []string{"POD", "NODE", "ACCOUNT", "SERIAL", "LEFT", "POLICY", "STATE", "REASON"}
}
