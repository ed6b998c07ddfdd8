package upstream

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"castellan.dev/agent/svid"
	castellanv1 "castellan.dev/api/castellan/v1"
	"castellan.dev/internal/xds"
)

const (
	// debounce joins acknowledgements that come together.
	debounce      = 100 * time.Millisecond
	reportTimeout = 5 * time.Second
	// The server refuses a report that is over its bounds, whole. So every workload
	// has a share that it cannot leave: none can keep the others from being heard.
	maxReportBytes  = 3 << 20 // over the node
	maxStreams      = 32      // of one workload
	maxReported     = 1000    // resources of one workload
	maxReason       = 1024
	maxClient       = 256
	resourceMinimum = 16 // bytes a resource takes beside its texts
)

// Reports collects what the node's workloads are served and have applied, and
// tells the server when that changes.
type Reports struct {
	node    string
	results *prometheus.CounterVec
	log     *slog.Logger
	wake    chan struct{} // capacity 1

	mu        sync.Mutex
	workloads map[*Reporter]struct{}
	fresh     bool // the server at hand knows what was last sent
}

// Reporter is one workload's part of the report.
type Reporter struct {
	reports *Reports
	source  Identity
	streams map[*stream]struct{} // guarded by reports.mu
}

// stream is one open stream; it implements xds.NodeObserver.
type stream struct {
	reporter  *Reporter
	api       string
	client    string
	resources map[resourceKey]*castellanv1.ResourceReport
}

type resourceKey struct{ typeURL, name string }

func newReports(node string, results *prometheus.CounterVec, log *slog.Logger) *Reports {
	for _, result := range []string{"sent", "failed"} {
		results.WithLabelValues(result)
	}
	return &Reports{node: node, results: results, log: log, wake: make(chan struct{}, 1), workloads: map[*Reporter]struct{}{}}
}

// Workload adds a workload to the report; Close takes it out.
func (r *Reports) Workload(source Identity) *Reporter {
	w := &Reporter{reports: r, source: source, streams: map[*stream]struct{}{}}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.workloads[w] = struct{}{}
	r.touch()
	return w
}

// Close takes the workload out of the report.
func (w *Reporter) Close() {
	w.reports.mu.Lock()
	defer w.reports.mu.Unlock()
	delete(w.reports.workloads, w)
	w.reports.touch()
}

// Touch says that the workload's certificate has changed.
func (w *Reporter) Touch() { w.reports.touch() }

// Stream adds an open stream ("ads", "sds"); call end when it is over. The
// observer is an xds.NodeObserver too.
func (w *Reporter) Stream(api string) (observer xds.Observer, end func()) {
	s := &stream{reporter: w, api: api, resources: map[resourceKey]*castellanv1.ResourceReport{}}
	w.reports.mu.Lock()
	defer w.reports.mu.Unlock()
	w.streams[s] = struct{}{}
	w.reports.touch()
	return s, func() {
		w.reports.mu.Lock()
		defer w.reports.mu.Unlock()
		delete(w.streams, s)
		w.reports.touch()
	}
}

// Node takes what the client calls itself.
func (s *stream) Node(id string) {
	s.reporter.reports.mu.Lock()
	defer s.reporter.reports.mu.Unlock()
	s.client = id
	s.reporter.reports.touch()
}

// Acked takes an acknowledgement.
func (s *stream) Acked(typeURL string, versions map[string]string) {
	s.note(typeURL, versions, func(r *castellanv1.ResourceReport, version string) {
		r.Acked, r.Nacked, r.Reason = version, "", ""
	})
}

// Nacked takes a refusal; what was acknowledged before it still serves.
func (s *stream) Nacked(typeURL string, versions map[string]string, reason string) {
	s.note(typeURL, versions, func(r *castellanv1.ResourceReport, version string) {
		r.Nacked, r.Reason = version, reason[:min(len(reason), maxReason)]
	})
}

func (s *stream) note(typeURL string, versions map[string]string, change func(*castellanv1.ResourceReport, string)) {
	s.reporter.reports.mu.Lock()
	defer s.reporter.reports.mu.Unlock()
	for name, version := range versions {
		key := resourceKey{typeURL, name}
		if version == "" { // gone
			delete(s.resources, key)
			continue
		}
		r := &castellanv1.ResourceReport{TypeUrl: typeURL, Name: name}
		if old := s.resources[key]; old != nil {
			r.Acked = old.Acked
		}
		change(r, version)
		s.resources[key] = r
	}
	s.reporter.reports.touch()
}

func (r *Reports) touch() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// resend makes the next report go out even if nothing has changed: the server is
// another, or has forgotten.
func (r *Reports) resend() {
	r.forget()
	r.touch()
}

func (r *Reports) forget() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.fresh = false
}

// run sends a report after each change, until ctx ends.
func (r *Reports) run(ctx context.Context, send func(context.Context, *castellanv1.ReportRequest) error) {
	var last *castellanv1.ReportRequest
	for failures := 0; ; {
		wait := debounce
		if failures > 0 {
			wait = time.Duration(float64(min(debounce<<min(failures, 6), reportTimeout)) * (0.75 + 0.5*rand.Float64()))
		} else if !pause(ctx, r.wake, 0) {
			return
		}
		if !pause(ctx, nil, wait) {
			return
		}
		req, known := r.build()
		if known && last != nil && proto.Equal(last, req) {
			failures = 0
			continue
		}
		callCtx, cancel := context.WithTimeout(ctx, reportTimeout)
		err := send(callCtx, req)
		cancel()
		if err != nil {
			if ctx.Err() != nil {
				return
			}
			failures++
			r.forget()
			r.results.WithLabelValues("failed").Inc()
			r.log.Debug("report not sent, trying again", "error", err, "failures", failures)
			continue
		}
		failures, last = 0, req
		r.results.WithLabelValues("sent").Inc()
	}
}

// pause waits for d, or for wake where d is zero; false means that ctx is over.
func pause(ctx context.Context, wake <-chan struct{}, d time.Duration) bool {
	var timer <-chan time.Time
	if d > 0 {
		t := time.NewTimer(d)
		defer t.Stop()
		timer = t.C
	}
	select {
	case <-ctx.Done():
		return false
	case <-wake:
	case <-timer:
	}
	return true
}

// build returns the whole report, and whether the server still knows the last one.
func (r *Reports) build() (req *castellanv1.ReportRequest, known bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	known, r.fresh = r.fresh, true
	req = &castellanv1.ReportRequest{Node: r.node}
	for w := range r.workloads {
		state, _ := w.source.Current()
		if state.PodUID == "" {
			continue // who it is has not been read yet
		}
		req.Workloads = append(req.Workloads, w.report(state, maxReportBytes/len(r.workloads)))
	}
	slices.SortFunc(req.Workloads, func(a, b *castellanv1.WorkloadReport) int { return cmp.Compare(a.PodUid, b.PodUid) })
	return req, known
}

// report says what there is of one workload, in about so many bytes.
func (w *Reporter) report(state *svid.Snapshot, bytes int) *castellanv1.WorkloadReport {
	account := state.Workload.Account()
	out := &castellanv1.WorkloadReport{PodUid: state.PodUID, Namespace: account.Namespace(), ServiceAccount: account.Name()}
	if state.SVID != nil {
		out.Serial, out.NotAfter = state.SVID.Serial, timestamppb.New(state.SVID.NotAfter)
	}
	for s := range w.streams {
		out.Streams = append(out.Streams, s.report())
	}
	slices.SortFunc(out.Streams, func(a, b *castellanv1.StreamReport) int {
		return cmp.Or(cmp.Compare(refusals(b), refusals(a)), cmp.Compare(a.Client, b.Client))
	})
	out.Streams = out.Streams[:min(len(out.Streams), maxStreams)]
	if len(out.Streams) == 0 {
		return out
	}
	// Equal parts, so that the proxy is heard whatever else is open.
	resources, bytes := maxReported/len(out.Streams), bytes/len(out.Streams)
	for _, s := range out.Streams {
		left, n := bytes, 0
		for n < min(len(s.Resources), resources) && left > 0 {
			r := s.Resources[n]
			left -= resourceMinimum + len(r.TypeUrl) + len(r.Name) + len(r.Acked) + len(r.Nacked) + len(r.Reason)
			n++
		}
		s.Resources = s.Resources[:n]
	}
	return out
}

func refusals(s *castellanv1.StreamReport) int {
	n := 0
	for _, r := range s.Resources {
		if r.Nacked != "" {
			n++
		}
	}
	return min(n, 1)
}

func (s *stream) report() *castellanv1.StreamReport {
	out := &castellanv1.StreamReport{Client: s.api}
	if s.client != "" {
		out.Client = s.api + ":" + s.client[:min(len(s.client), maxClient)]
	}
	for _, r := range s.resources {
		out.Resources = append(out.Resources, r)
	}
	// What matters most comes first, so that the bounds cut the rest.
	slices.SortFunc(out.Resources, func(a, b *castellanv1.ResourceReport) int {
		return cmp.Or(cmp.Compare(rank(a), rank(b)), cmp.Compare(a.TypeUrl, b.TypeUrl), cmp.Compare(a.Name, b.Name))
	})
	return out
}

// rank puts refusals first and the mesh-wide lists last.
func rank(r *castellanv1.ResourceReport) int {
	switch {
	case r.Nacked != "":
		return 0
	case r.TypeUrl == TypeServiceIdentity:
		return 3
	case r.TypeUrl == TypeJwks:
		return 2
	default:
		return 1
	}
}

// report sends one report as the agent.
func (f *Follower) report(ctx context.Context, req *castellanv1.ReportRequest) error {
	conn, err := f.dial(ctx, &f.reporting)
	if err != nil {
		return err
	}
	if _, err := castellanv1.NewNodeClient(conn).Report(ctx, req); err != nil {
		f.judge(&f.reporting, conn, err)
		return fmt.Errorf("report: %w", err)
	}
	return nil
}
