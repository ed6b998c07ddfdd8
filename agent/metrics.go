package agent

import (
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"castellan.dev/agent/svid"
)

// metrics is what the sockets count; none of it names a peer.
type metrics struct {
	refusals *prometheus.CounterVec
	streams  *prometheus.GaugeVec
	push     *prometheus.HistogramVec
	first    prometheus.Histogram
}

func newMetrics(reg prometheus.Registerer) *metrics {
	m := &metrics{
		refusals: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "castellan_agent_refused_total",
			Help: "Connections and calls turned away at the workloads' sockets, by reason: uid, limit, credentials, calls, room.",
		}, []string{"reason"}),
		streams: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "castellan_agent_streams", Help: "Open streams of workloads, by API.",
		}, []string{"api"}),
		push: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "castellan_agent_push_seconds",
			Help:    "Time from a change of a workload's state (a certificate received, a bundle changed) to its being sent on an open stream, by API.",
			Buckets: []float64{.0001, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, 1},
		}, []string{"api"}),
		first: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "castellan_agent_first_certificate_seconds",
			Help:    "Time from a pod's being published (or served again, after a restart) to its certificate.",
			Buckets: []float64{.005, .01, .025, .05, .1, .2, .3, .5, 1, 2.5, 5, 10, 30},
		}),
	}
	for _, reason := range []string{"uid", "limit", "credentials", "calls", "room"} {
		m.refusals.WithLabelValues(reason)
	}
	for _, api := range []string{"workloadapi", "sds", "ads", "other"} {
		m.streams.WithLabelValues(api)
	}
	if reg != nil {
		reg.MustRegister(m.refusals, m.streams, m.push, m.first)
	}
	return m
}

func (m *metrics) refused(reason string) { m.refusals.WithLabelValues(reason).Inc() }

func (m *metrics) pushed(api string, d time.Duration) {
	m.push.WithLabelValues(api).Observe(max(d, 0).Seconds())
}

// waitFirst measures how long source takes to be valid for the first time.
func (m *metrics) waitFirst(ctx context.Context, source *svid.Source, now func() time.Time) {
	begin := now()
	for {
		state, changed := source.Current()
		if state.Status == svid.Valid {
			m.first.Observe(max(state.Published.Sub(begin), 0).Seconds())
			return
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}
