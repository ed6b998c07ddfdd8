package discovery

import (
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	documents  *prometheus.GaugeVec
	workloads  prometheus.Gauge
	denied     prometheus.Gauge
	streams    prometheus.Gauge
	updates    prometheus.Histogram
	answers    *prometheus.CounterVec
	reports    prometheus.Counter
	keepErrors prometheus.Counter
}

// newMetrics registers with r; nil counts for nobody.
func newMetrics(r prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		documents: prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "castellan_discovery_documents",
			Help: "Policy documents by state: accepted, last_good (refused, last good version in force) or refused (whoever it could select denies)."}, []string{"state"}),
		workloads: prometheus.NewGauge(prometheus.GaugeOpts{Name: "castellan_discovery_workloads", Help: "Workloads that policy is published for."}),
		denied:    prometheus.NewGauge(prometheus.GaugeOpts{Name: "castellan_discovery_denied_workloads", Help: "Workloads that deny everything because of a refused document."}),
		streams:   prometheus.NewGauge(prometheus.GaugeOpts{Name: "castellan_discovery_streams", Help: "Open streams of agents."}),
		updates: prometheus.NewHistogram(prometheus.HistogramOpts{Name: "castellan_discovery_update_seconds",
			Help: "Time from a change to its publication.", Buckets: []float64{.001, .005, .02, .1, .5, 2}}),
		answers: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "castellan_discovery_answers_total",
			Help: "Answers of agents to responses, by resource type and result (ack, nack)."}, []string{"type", "result"}),
		reports:    prometheus.NewCounter(prometheus.CounterOpts{Name: "castellan_discovery_reports_total", Help: "Node reports taken."}),
		keepErrors: prometheus.NewCounter(prometheus.CounterOpts{Name: "castellan_discovery_keep_errors_total", Help: "Failures to keep last good documents on disk."}),
	}
	if r == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{m.documents, m.workloads, m.denied, m.streams, m.updates, m.answers, m.reports, m.keepErrors} {
		if err := r.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// built counts a new state.
func (m *metrics) built(s *state, took time.Duration) {
	counts := map[string]int{"accepted": 0, "last_good": 0, "refused": 0}
	for i := range s.statuses {
		switch st := &s.statuses[i]; {
		case st.notice: // of no document
		case st.accepted:
			counts["accepted"]++
		case st.lastGood:
			counts["last_good"]++
		case st.denies != nil:
			counts["refused"]++
		}
	}
	for name, n := range counts {
		m.documents.WithLabelValues(name).Set(float64(n))
	}
	denied := 0
	for _, w := range s.workloads {
		if w.denyReason != "" {
			denied++
		}
	}
	m.workloads.Set(float64(len(s.workloads)))
	m.denied.Set(float64(denied))
	m.updates.Observe(took.Seconds())
}

// observer counts the answers on one stream.
func (m *metrics) observer() answerCounter { return answerCounter{m.answers} }

type answerCounter struct{ answers *prometheus.CounterVec }

// Acked implements xds.Observer.
func (a answerCounter) Acked(typeURL string, _ map[string]string) { a.count(typeURL, "ack") }

// Nacked implements xds.Observer.
func (a answerCounter) Nacked(typeURL string, _ map[string]string, _ string) {
	a.count(typeURL, "nack")
}

// count labels by the type's short name; a stream has only types that are served.
func (a answerCounter) count(typeURL, result string) {
	a.answers.WithLabelValues(typeURL[strings.LastIndexByte(typeURL, '.')+1:], result).Inc()
}
