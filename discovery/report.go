package discovery

import (
	"context"
	"log/slog"
	"maps"
	"sync"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	castellanv1 "castellan.dev/api/castellan/v1"
)

// Bounds of one report, and with it of what is kept per node.
const (
	maxReportWorkloads = 2000
	maxReportStreams   = 64
	maxReportResources = 10_000 // over a workload's streams
	maxReportText      = 2048   // names are SPIFFE IDs at the longest; reasons are cut
)

// reports holds what each node's agent last said.
type reports struct {
	mu     sync.Mutex
	byNode map[string]map[string]*castellanv1.WorkloadReport // node → pod UID → report
}

// Report replaces everything that the calling agent said before. An agent speaks
// for its own node only: another node's name is refused, and what it says of pods
// that are not there is left out.
func (s *Server) Report(ctx context.Context, req *castellanv1.ReportRequest) (*castellanv1.ReportResponse, error) {
	node, err := s.caller(ctx)
	if err != nil {
		return nil, err
	}
	if req.GetNode() != node {
		s.log.Warn("report refused: an agent speaks for another node", slog.String("node", node), slog.String("reported", clip(req.GetNode())))
		return nil, status.Error(codes.PermissionDenied, "an agent reports its own node only")
	}
	if err := checkReport(req); err != nil {
		return nil, err
	}
	st := s.state.Load()
	if st == nil {
		return nil, status.Error(codes.Unavailable, "not ready yet")
	}
	own := make(map[string]*castellanv1.WorkloadReport, len(req.GetWorkloads()))
	for _, r := range req.GetWorkloads() {
		w := st.byUID[r.GetPodUid()]
		if w == nil || w.Node != node || w.Namespace != r.GetNamespace() || w.ServiceAccount != r.GetServiceAccount() {
			s.log.Debug("report of a workload that is not on the node is left out", slog.String("node", node), slog.String("pod_uid", clip(r.GetPodUid())))
			continue
		}
		own[w.PodUID] = proto.CloneOf(r)
	}
	if s.reports.set(node, own) {
		s.news.tell()
	}
	s.metrics.reports.Inc()
	return &castellanv1.ReportResponse{}, nil
}

func checkReport(req *castellanv1.ReportRequest) error {
	tooMany := func(what string) error {
		return status.Errorf(codes.InvalidArgument, "report holds too many or too long %s", what)
	}
	if len(req.GetWorkloads()) > maxReportWorkloads {
		return tooMany("workloads")
	}
	for _, w := range req.GetWorkloads() {
		if len(w.GetStreams()) > maxReportStreams || len(w.GetSerial()) > maxReportText {
			return tooMany("streams")
		}
		resources := 0
		for _, st := range w.GetStreams() {
			if resources += len(st.GetResources()); resources > maxReportResources || len(st.GetClient()) > maxReportText {
				return tooMany("resources")
			}
			for _, r := range st.GetResources() {
				for _, text := range []string{r.GetTypeUrl(), r.GetName(), r.GetAcked(), r.GetNacked(), r.GetReason()} {
					if len(text) > maxReportText {
						return tooMany("texts")
					}
				}
			}
		}
	}
	return nil
}

// set replaces what a node said, and reports whether that says anything else.
func (r *reports) set(node string, own map[string]*castellanv1.WorkloadReport) (changed bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	changed = !maps.EqualFunc(r.byNode[node], own, func(a, b *castellanv1.WorkloadReport) bool { return proto.Equal(a, b) })
	r.byNode[node] = own
	return changed
}

// all returns what was said of each workload, nil where nothing was. They must not
// be changed.
func (r *reports) all(workloads []*workload) []*castellanv1.WorkloadReport {
	out := make([]*castellanv1.WorkloadReport, len(workloads))
	r.mu.Lock()
	defer r.mu.Unlock()
	for i, w := range workloads {
		out[i] = r.byNode[w.Node][w.PodUID]
	}
	return out
}

// prune forgets nodes without workloads.
func (r *reports) prune(s *state) {
	live := map[string]bool{}
	for _, w := range s.byUID {
		live[w.Node] = true
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for node := range r.byNode {
		if !live[node] {
			delete(r.byNode, node)
		}
	}
}

// programmed reports whether every stream of the workload that follows its policy
// has accepted the version that is offered now, and there is one; and whether any
// has refused it.
func programmed(w *workload, report *castellanv1.WorkloadReport) (accepted, refused bool) {
	any, all := false, true
	for _, st := range report.GetStreams() {
		for _, r := range st.GetResources() {
			if r.GetTypeUrl() != castellanv1.TypeWorkloadPolicy {
				continue
			}
			any = true
			if r.GetAcked() != w.resource.Version || r.GetNacked() != "" {
				all = false
			}
			if r.GetNacked() != "" {
				refused = true
			}
		}
	}
	return any && all, refused
}

// clip bounds what a peer gets into a log line.
func clip(s string) string {
	if len(s) > 128 {
		return s[:128]
	}
	return s
}
