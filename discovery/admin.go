package discovery

import (
	"context"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	castellanv1 "castellan.dev/api/castellan/v1"
)

// Policies tells the operator what became of every document and every workload.
func (s *Server) Policies(context.Context, *castellanv1.PoliciesRequest) (*castellanv1.PoliciesResponse, error) {
	st := s.state.Load()
	if st == nil {
		return nil, status.Error(codes.Unavailable, "no policy has been read yet")
	}
	resp := &castellanv1.PoliciesResponse{}
	counts := map[Ref]count{}
	acknowledged := make([]bool, len(st.workloads))
	for i, w := range st.workloads {
		report := s.reports.of(w)
		acknowledged[i] = programmed(w, report)
		for _, d := range w.docs {
			c := counts[d.ref]
			c.add(acknowledged[i])
			counts[d.ref] = c
		}
		resp.Workloads = append(resp.Workloads, &castellanv1.WorkloadStatus{
			PodUid: w.PodUID, Namespace: w.Namespace, ServiceAccount: w.ServiceAccount, Node: w.Node,
			DenyAll: w.denyReason != "", DenyReason: w.denyReason, Version: w.resource.Version, Report: report,
		})
	}
	for i := range st.statuses {
		p := &st.statuses[i]
		var c count
		switch {
		case p.accepted || p.lastGood:
			c = counts[p.Ref]
		case p.denies != nil:
			for i, w := range st.workloads {
				if p.denies.covers(w.Namespace, w.Labels, s.cfg.Mesh) {
					c.add(acknowledged[i])
				}
			}
		}
		resp.Policies = append(resp.Policies, p.proto(c))
	}
	return resp, nil
}

// count is of the workloads a document selects, and of those that enforce it.
type count struct{ selected, programmed uint32 }

func (c *count) add(acknowledged bool) {
	c.selected++
	if acknowledged {
		c.programmed++
	}
}

func (p *docStatus) proto(c count) *castellanv1.PolicyStatus {
	// A file's name may be any bytes, but this travels as text.
	text := func(s string) string { return strings.ToValidUTF8(s, "?") }
	out := &castellanv1.PolicyStatus{
		File: text(p.File), Kind: p.Ref.Kind, Namespace: p.Ref.Namespace, Name: p.Ref.Name,
		Accepted: p.accepted, LastGoodInForce: p.lastGood, Selected: c.selected, Programmed: c.programmed,
	}
	for _, f := range p.Findings {
		out.Findings = append(out.Findings, &castellanv1.PolicyFinding{
			Severity: f.Severity, Field: text(f.Field), Value: text(f.Value), Reason: text(f.Reason)})
	}
	return out
}
