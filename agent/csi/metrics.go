package csi

import (
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"
)

// metrics is what the kubelet's side counts; no pod is named in it.
type metrics struct{ calls *prometheus.CounterVec }

func newMetrics(reg prometheus.Registerer, volumes func() float64) *metrics {
	m := &metrics{calls: prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "castellan_agent_csi_calls_total", Help: "Calls of the kubelet, by method and gRPC code.",
	}, []string{"method", "code"})}
	for _, method := range []string{"NodePublishVolume", "NodeUnpublishVolume"} {
		m.calls.WithLabelValues(method, codes.OK.String())
	}
	if reg != nil {
		reg.MustRegister(m.calls, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "castellan_agent_volumes", Help: "Volumes of pods that are served.",
		}, volumes))
	}
	return m
}

func (m *metrics) called(method string, code codes.Code) {
	m.calls.WithLabelValues(method, code.String()).Inc()
}
