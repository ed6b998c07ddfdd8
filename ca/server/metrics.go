package server

import (
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics counts what callers get.
type metrics struct {
	requests *prometheus.CounterVec
	refusals *prometheus.CounterVec
	seconds  *prometheus.HistogramVec
	// suppressed counts the log lines of refusals that were left out.
	suppressed prometheus.Counter

	issuedX509, issuedJWT prometheus.Counter
	tookX509, tookJWT     prometheus.Observer
}

// newMetrics registers with r; with a nil r the metrics count for nobody.
func newMetrics(r prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "castellan_server_identity_requests_total",
			Help: "Requests for an identity, by kind (x509-svid, jwt-svid) and outcome (issued, refused).",
		}, []string{"kind", "outcome"}),
		refusals: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "castellan_server_identity_refusals_total",
			Help: "Refused requests for an identity, by kind and reason.",
		}, []string{"kind", "reason"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "castellan_server_identity_request_seconds",
			Help:    "Time from request to answer, by kind.",
			Buckets: prometheus.ExponentialBuckets(0.0005, 2, 14),
		}, []string{"kind"}),
		suppressed: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "castellan_server_identity_log_suppressed_total",
			Help: "Log lines of refused requests left out, because there were too many of one reason.",
		}),
	}
	m.issuedX509 = m.requests.WithLabelValues(string(kindX509), "issued")
	m.issuedJWT = m.requests.WithLabelValues(string(kindJWT), "issued")
	m.tookX509 = m.seconds.WithLabelValues(string(kindX509))
	m.tookJWT = m.seconds.WithLabelValues(string(kindJWT))
	if r == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{m.requests, m.refusals, m.seconds, m.suppressed} {
		if err := r.Register(c); err != nil {
			return nil, fmt.Errorf("server: metrics: %w", err)
		}
	}
	return m, nil
}

func (m *metrics) issued(k kind, took time.Duration) {
	if k == kindJWT {
		m.issuedJWT.Inc()
		m.tookJWT.Observe(took.Seconds())
		return
	}
	m.issuedX509.Inc()
	m.tookX509.Observe(took.Seconds())
}

func (m *metrics) refused(k kind, reason string, took time.Duration) {
	m.requests.WithLabelValues(string(k), "refused").Inc()
	m.refusals.WithLabelValues(string(k), reason).Inc()
	m.seconds.WithLabelValues(string(k)).Observe(took.Seconds())
}
