package webhook

import "github.com/prometheus/client_golang/prometheus"

type metrics struct {
	reviews    *prometheus.CounterVec
	seconds    *prometheus.HistogramVec
	warnings   *prometheus.CounterVec
	suppressed prometheus.Counter
}

// newMetrics registers with r; nil keeps them to ourselves.
func newMetrics(r prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		reviews: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "castellan_webhook_reviews_total",
			Help: "Admission reviews by webhook and what became of them.",
		}, []string{"webhook", "result"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "castellan_webhook_review_seconds",
			Help:    "Time from a review's head to its answer.",
			Buckets: []float64{0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1, 5},
		}, []string{"webhook"}),
		warnings: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "castellan_webhook_warnings_total",
			Help: "Warnings returned with answers.",
		}, []string{"webhook"}),
		suppressed: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "castellan_webhook_log_suppressed_total",
			Help: "Log lines about refused reviews that were left out because there were too many.",
		}),
	}
	if r == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{m.reviews, m.seconds, m.warnings, m.suppressed} {
		if err := r.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}
