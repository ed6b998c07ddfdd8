package proxy

import (
	"strconv"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"castellan.dev/internal/judge"
)

// direction is which side of the application a connection is on.
type direction uint8

const (
	inboundSide direction = iota
	outboundSide
	sides
)

func (d direction) String() string {
	if d == outboundSide {
		return "outbound"
	}
	return "inbound"
}

// maxStatus bounds the statuses counted one by one; others count as 0.
const maxStatus = 600

// metrics holds every series that a request touches, resolved beforehand: a
// request costs atomic additions and no look-up.
type metrics struct {
	requests [sides]statusCounters
	duration [sides]prometheus.Observer
	received [sides]prometheus.Counter
	sent     [sides]prometheus.Counter
	open     [sides]prometheus.Gauge
	conns    [sides]map[string]prometheus.Counter

	denied    *prometheus.CounterVec
	deniedBy  map[string]prometheus.Counter
	refused   *prometheus.CounterVec
	closed    *prometheus.CounterVec
	connects  *prometheus.CounterVec
	handshake prometheus.Observer
	updates   *prometheus.CounterVec
}

// statusCounters resolves a status's series at its first use.
type statusCounters struct {
	vec   *prometheus.CounterVec
	side  string
	cache [maxStatus]atomic.Pointer[prometheus.Counter]
}

func (s *statusCounters) inc(status int) {
	if status < 0 || status >= maxStatus {
		status = 0
	}
	c := s.cache[status].Load()
	if c == nil {
		counter := s.vec.WithLabelValues(s.side, strconv.Itoa(status))
		c = &counter
		s.cache[status].Store(c)
	}
	(*c).Inc()
}

// deniedNoPolicy is counted in castellan_proxy_denied_total beside the kinds of package judge.
const deniedNoPolicy = "no_policy"

func newMetrics(reg prometheus.Registerer) *metrics {
	requests := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "castellan_proxy_requests_total", Help: "HTTP requests, by side and status sent (0: none was).",
	}, []string{"direction", "code"})
	duration := prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "castellan_proxy_request_duration_seconds", Help: "Time from a request's first byte to its response's last.",
		Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 10, 60},
	}, []string{"direction"})
	bytes := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "castellan_proxy_bytes_total", Help: "Body bytes (of TCP: all bytes) from and to the side that connected.",
	}, []string{"direction", "flow"})
	open := prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "castellan_proxy_connections", Help: "Connections accepted and open.",
	}, []string{"direction"})
	conns := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "castellan_proxy_connections_total", Help: "Connections served, by side, protocol and security.",
	}, []string{"direction", "protocol", "security"})
	handshake := prometheus.NewHistogram(prometheus.HistogramOpts{
		Name: "castellan_proxy_handshake_seconds", Help: "Time of inbound TLS handshakes that succeeded.",
		Buckets: []float64{.0005, .001, .0025, .005, .01, .05, .25, 1, 5},
	})
	m := &metrics{
		handshake: handshake,
		denied: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "castellan_proxy_denied_total", Help: "Requests and TCP connections refused by policy, by reason.",
		}, []string{"reason"}),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "castellan_proxy_connections_refused_total", Help: "Connections refused before any request, by side and reason.",
		}, []string{"direction", "reason"}),
		closed: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "castellan_proxy_connections_closed_total", Help: "Live connections closed by us, by side and reason.",
		}, []string{"direction", "reason"}),
		connects: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "castellan_proxy_upstream_connects_total", Help: "Connections opened upstream, by side and result.",
		}, []string{"direction", "result"}),
		updates: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "castellan_proxy_updates_total", Help: "Updates from the agent, by resource and result.",
		}, []string{"resource", "result"}),
	}
	reg.MustRegister(requests, duration, bytes, open, conns, handshake, m.denied, m.refused, m.closed, m.connects, m.updates)
	m.deniedBy = map[string]prometheus.Counter{}
	for _, r := range []string{deniedNoPolicy, judge.KindPolicy, judge.KindToken, judge.KindPath} {
		m.deniedBy[r] = m.denied.WithLabelValues(r)
	}
	for side := range sides {
		name := side.String()
		m.requests[side].vec, m.requests[side].side = requests, name
		m.duration[side] = duration.WithLabelValues(name)
		m.received[side] = bytes.WithLabelValues(name, "received")
		m.sent[side] = bytes.WithLabelValues(name, "sent")
		m.open[side] = open.WithLabelValues(name)
		m.conns[side] = map[string]prometheus.Counter{}
		for _, protocol := range []string{"http1", "http2", "tcp"} {
			for _, security := range []string{"mtls", "plaintext"} {
				m.conns[side][protocol+security] = conns.WithLabelValues(name, protocol, security)
			}
		}
	}
	return m
}

// request counts one finished request.
func (m *metrics) request(side direction, status int, received, sent int64, took time.Duration) {
	m.requests[side].inc(status)
	m.duration[side].Observe(took.Seconds())
	m.transferred(side, received, sent)
}

func (m *metrics) transferred(side direction, received, sent int64) {
	if received > 0 {
		m.received[side].Add(float64(received))
	}
	if sent > 0 {
		m.sent[side].Add(float64(sent))
	}
}

// observe registers what is read from the proxy's state when asked.
func (p *Proxy) observe(reg prometheus.Registerer) {
	gauge := func(name, help string, value func() float64) {
		reg.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, value))
	}
	gauge("castellan_proxy_certificate_not_after_seconds", "When our certificate ends, in Unix time; 0 without one.", func() float64 {
		if svid := p.store.load().svid; svid != nil {
			return float64(svid.Leaf.NotAfter.Unix())
		}
		return 0
	})
	gauge("castellan_proxy_policy_received", "1 when a policy is in force, 0 while everything is denied for want of one.", func() float64 {
		if p.store.load().policy != nil {
			return 1
		}
		return 0
	})
	gauge("castellan_proxy_draining", "1 while the proxy drains.", func() float64 {
		if p.draining.Load() {
			return 1
		}
		return 0
	})
	reg.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{
		Name: "castellan_proxy_access_log_dropped_total", Help: "Access log lines that a slow or failing log lost.",
	}, func() float64 { return float64(p.cfg.AccessLog.Dropped()) }))
}
