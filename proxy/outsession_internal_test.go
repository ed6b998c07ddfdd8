package proxy

import (
	"crypto/tls"
	"net/netip"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"castellan.dev/internal/config"
	"castellan.dev/proxy/engine"
)

// A service made anew has another address, which an application looks up for new
// connections only: one that leads nowhere is ended with its answer. A configured
// listener's may lead somewhere again, and stays.
func TestConnectionsThatLeadNowhereEnd(t *testing.T) {
	p, err := New(Config{Proxy: config.Proxy{}, Registerer: prometheus.NewRegistry()})
	if err != nil {
		t.Fatal(err)
	}
	p.store.current.Store(&state{svid: &tls.Certificate{}, trust: trustOf("1"), index: newIndex("")})
	for _, test := range []struct {
		name  string
		out   outbound
		close bool
	}{
		{"captured", outbound{p: p, original: netip.MustParseAddrPort("10.96.0.1:80")}, true},
		{"configured", outbound{p: p, service: "shop/orders", port: 80}, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			v := (&outboundSession{out: &test.out}).Begin(&engine.Request{})
			if v.Status != 502 || v.Body != bodyNoDestination || v.Close != test.close {
				t.Errorf("%d %q, close %t", v.Status, v.Body, v.Close)
			}
		})
	}
}
