package svid

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"castellan.dev/agent/caclient"
)

// Metrics counts what the rotator does.
type Metrics struct {
	rotations *prometheus.CounterVec
	seconds   prometheus.Histogram
}

// NewMetrics registers the metrics; a nil registerer keeps them to themselves.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	m := &Metrics{
		rotations: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "castellan_agent_rotations_total",
			Help: "Attempts to have a certificate signed, by result: issued, unreachable, refused, unauthenticated, invalid, bad_answer, bad_credential.",
		}, []string{"result"}),
		seconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "castellan_agent_issue_seconds",
			Help:    "Time from asking for a certificate to holding it.",
			Buckets: prometheus.ExponentialBuckets(0.001, 2, 14),
		}),
	}
	for _, k := range []caclient.Kind{caclient.Unreachable, caclient.Refused, caclient.Unauthenticated, caclient.Invalid, caclient.BadAnswer, caclient.BadCredential} {
		m.rotations.WithLabelValues(k.String())
	}
	m.rotations.WithLabelValues("issued")
	if reg != nil {
		reg.MustRegister(m.rotations, m.seconds)
	}
	return m
}

func (m *Metrics) observe(took time.Duration, err error) {
	if err != nil {
		m.rotations.WithLabelValues(caclient.KindOf(err).String()).Inc()
		return
	}
	m.rotations.WithLabelValues("issued").Inc()
	m.seconds.Observe(took.Seconds())
}

// expiryCollector reports how long each workload's certificate still lives, as
// of the scrape.
type expiryCollector struct {
	rotator *Rotator
	desc    *prometheus.Desc
}

// ExpiryCollector returns a collector of castellan_agent_svid_expiry_seconds:
// seconds until each SVID expires, negative once it has, absent before the first.
func (r *Rotator) ExpiryCollector() prometheus.Collector {
	return &expiryCollector{rotator: r, desc: prometheus.NewDesc("castellan_agent_svid_expiry_seconds",
		"Seconds until the workload's certificate expires.", []string{"namespace", "service_account", "pod_uid"}, nil)}
}

func (c *expiryCollector) Describe(ch chan<- *prometheus.Desc) { ch <- c.desc }

func (c *expiryCollector) Collect(ch chan<- prometheus.Metric) {
	type labels struct{ namespace, account, uid string }
	left := map[labels]float64{}
	c.rotator.mu.Lock()
	now := c.rotator.cfg.Now()
	for _, e := range c.rotator.entries {
		if e.svid != nil {
			a := e.workload.Account()
			left[labels{a.Namespace(), a.Name(), e.podUID}] = e.svid.NotAfter.Sub(now).Seconds()
		}
	}
	c.rotator.mu.Unlock()
	for l, v := range left {
		ch <- prometheus.MustNewConstMetric(c.desc, prometheus.GaugeValue, v, l.namespace, l.account, l.uid)
	}
}
