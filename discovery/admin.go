package discovery

import (
	"context"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	castellanv1 "castellan.dev/api/castellan/v1"
	"castellan.dev/authz"
)

// Policies tells the operator what became of every document and every workload of
// the mesh.
func (s *Server) Policies(context.Context, *castellanv1.PoliciesRequest) (*castellanv1.PoliciesResponse, error) {
	st := s.state.Load()
	if st == nil {
		return nil, status.Error(codes.Unavailable, "no policy has been read yet")
	}
	resp := &castellanv1.PoliciesResponse{}
	t := s.tally(st)
	for i, w := range st.workloads {
		resp.Workloads = append(resp.Workloads, &castellanv1.WorkloadStatus{
			PodUid: w.PodUID, PodName: w.PodName, Namespace: w.Namespace, ServiceAccount: w.ServiceAccount, Node: w.Node,
			DenyAll: w.denyReason != "", DenyReason: w.denyReason, Version: w.resource.Version, Report: t.reports[i],
		})
	}
	findings := s.warner.findings(st)
	for i := range st.statuses {
		p := &st.statuses[i]
		resp.Policies = append(resp.Policies, p.proto(t.of(p, s.cfg.Mesh), findings[i]))
	}
	return resp, nil
}

func (p *docStatus) proto(c count, findings []authz.Finding) *castellanv1.PolicyStatus {
	// A file's name may be any bytes, but this travels as text.
	text := func(s string) string { return strings.ToValidUTF8(s, "?") }
	out := &castellanv1.PolicyStatus{
		File: text(p.File), Kind: p.Ref.Kind, Namespace: p.Ref.Namespace, Name: p.Ref.Name,
		Accepted: p.accepted, LastGoodInForce: p.lastGood, Selected: c.selected, Programmed: c.programmed,
	}
	for _, f := range findings {
		out.Findings = append(out.Findings, &castellanv1.PolicyFinding{
			Severity: f.Severity, Field: text(f.Field), Value: text(f.Value), Reason: text(f.Reason)})
	}
	return out
}
