package ca

import "github.com/prometheus/client_golang/prometheus"

// metrics are registered where there is a Registerer and counted in any case.
type metrics struct {
	issued         *prometheus.CounterVec
	issuedOK       prometheus.Counter
	byUnnamed      prometheus.Counter
	jwts           prometheus.Counter
	renewals       *prometheus.CounterVec
	notAfter       *prometheus.GaugeVec
	bundleSequence prometheus.Gauge
	unconstrained  prometheus.Gauge
}

func newMetrics() *metrics {
	m := &metrics{
		issued: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "castellan_ca_svid_requests_total",
			Help: "Requests for X509-SVIDs by result: issued, refused (the caller's fault), ledger, no_issuer, lint, cancelled, failed.",
		}, []string{"result"}),
		byUnnamed: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "castellan_ca_svids_unconstrained_total",
			Help: "X509-SVIDs signed by a plugged-in issuer without name constraints.",
		}),
		jwts: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "castellan_ca_jwt_svids_total",
			Help: "JWT-SVIDs signed.",
		}),
		renewals: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "castellan_ca_renewals_total",
			Help: "Renewals of the authority's own issuers by result: ok, failed.",
		}, []string{"result"}),
		notAfter: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "castellan_ca_certificate_not_after_seconds",
			Help: "When the authority's own certificates end, in seconds since 1970, by role.",
		}, []string{"role"}),
		bundleSequence: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "castellan_ca_bundle_sequence",
			Help: "Sequence number of the bundle.",
		}),
		unconstrained: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "castellan_ca_unconstrained_issuer",
			Help: "1 while the plugged-in CA has no name constraints.",
		}),
	}
	m.issuedOK = m.issued.WithLabelValues("issued")
	return m
}

func (m *metrics) register(r prometheus.Registerer) error {
	if r == nil {
		return nil
	}
	for _, c := range []prometheus.Collector{m.issued, m.byUnnamed, m.jwts, m.renewals, m.notAfter, m.bundleSequence, m.unconstrained} {
		if err := r.Register(c); err != nil {
			return err
		}
	}
	return nil
}
