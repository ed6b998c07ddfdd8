package agent

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics is what the sockets count; none of it names a peer.
type metrics struct {
	refusals *prometheus.CounterVec
	streams  *prometheus.GaugeVec
	push     *prometheus.HistogramVec
}

func newMetrics(reg prometheus.Registerer) *metrics {
	m := &metrics{
		refusals: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "castellan_agent_refused_total",
			Help: "Connections and calls turned away at the workloads' sockets, by reason: uid, limit, credentials, calls.",
		}, []string{"reason"}),
		streams: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "castellan_agent_streams", Help: "Open streams of workloads, by API.",
		}, []string{"api"}),
		push: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "castellan_agent_push_seconds",
			Help:    "Time from a change of a workload's state (a certificate received, a bundle changed) to its being sent on an open stream, by API.",
			Buckets: []float64{.0001, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, 1},
		}, []string{"api"}),
	}
	for _, reason := range []string{"uid", "limit", "credentials", "calls"} {
		m.refusals.WithLabelValues(reason)
	}
	for _, api := range []string{"workloadapi", "sds", "ads", "other"} {
		m.streams.WithLabelValues(api)
	}
	if reg != nil {
		reg.MustRegister(m.refusals, m.streams, m.push)
	}
	return m
}

func (m *metrics) refused(reason string) { m.refusals.WithLabelValues(reason).Inc() }

func (m *metrics) pushed(api string, d time.Duration) {
	m.push.WithLabelValues(api).Observe(max(d, 0).Seconds())
}
