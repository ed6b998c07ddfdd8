package config

import (
	"errors"
	"fmt"
	"net"
	"strings"
	"time"
)

// Proxy configures castellan-proxy: sockets, listeners and limits only. Policy
// and mesh settings come from the server, through the agent.
type Proxy struct {
	Header `json:",inline"`

	// AgentSocket is the agent's socket for this workload.
	AgentSocket string     `json:"agentSocket"`
	Inbound     []Inbound  `json:"inbound,omitempty"`
	Outbound    []Outbound `json:"outbound,omitempty"`
	// Capture takes in what the kernel redirects, in a pod.
	Capture *Capture `json:"capture,omitempty"`
	// Ready is the host:port of /healthz/ready, in a pod ":15021"; none by default.
	Ready string `json:"ready,omitempty"`
	// Probes are the application's probes by the path, below /app-health/, at which
	// the admin listener answers them.
	Probes map[string]Probe `json:"probes,omitempty"`
	// Admin is the host:port of /livez, /readyz and /metrics; default ":15020".
	Admin string `json:"admin,omitempty"`
	// AccessLog is "stdout", "off" or a file; default stdout. One JSON object a line.
	AccessLog string      `json:"accessLog,omitempty"`
	Limits    ProxyLimits `json:"limits,omitzero"`
	// DrainTimeout is how long live requests may take after a signal; default 5s.
	DrainTimeout Duration `json:"drainTimeout,omitempty"`
	Log          Log      `json:"log,omitzero"`
}

// Inbound is one listener in front of the application.
type Inbound struct {
	Listen string `json:"listen"`
	// Port is the workload port this listener stands for (policy's ports, PeerAuthentication's portLevelMtls); default the listener's own.
	Port uint16 `json:"port,omitempty"`
	// App is the host:port the application listens on.
	App string `json:"app"`
}

// Outbound is one plain listener of the application for one destination.
type Outbound struct {
	Listen string `json:"listen"`
	// Service is "<namespace>/<name>".
	Service string `json:"service"`
	// Port is the service port; default the service's first.
	Port uint16 `json:"port,omitempty"`
}

// ProxyLimits bound what a peer can cost; zero means the default.
type ProxyLimits struct {
	MaxHeaderBytes    int      `json:"maxHeaderBytes,omitempty"`    // default 32768
	MaxConnections    int      `json:"maxConnections,omitempty"`    // default 8000
	MaxPerSource      int      `json:"maxPerSource,omitempty"`      // per source IP; default 2500
	MaxHandshakes     int      `json:"maxHandshakes,omitempty"`     // computed at once; default 256
	MaxStreams        int      `json:"maxStreams,omitempty"`        // per HTTP/2 connection; default 100
	HandshakeTimeout  Duration `json:"handshakeTimeout,omitempty"`  // default 5s
	HeaderTimeout     Duration `json:"headerTimeout,omitempty"`     // default 10s
	IdleTimeout       Duration `json:"idleTimeout,omitempty"`       // default 5m
	ConnectTimeout    Duration `json:"connectTimeout,omitempty"`    // default 5s
	ResponseTimeout   Duration `json:"responseTimeout,omitempty"`   // to the response's head; default 60s
	StreamIdleTimeout Duration `json:"streamIdleTimeout,omitempty"` // no byte either way in a body or tunnel; default 5m

	// inFlight follows from the limit of memory and cannot be configured.
	inFlight int64
}

// Validate fills defaults and checks what can be checked without opening anything.
func (p *Proxy) Validate() error {
	if err := p.check("ProxyConfig"); err != nil {
		return err
	}
	setDefault(&p.Admin, ":15020")
	setDefault(&p.AccessLog, "stdout")
	setDefault(&p.DrainTimeout, Duration(5*time.Second))
	p.Limits.setDefaults()
	if err := CheckSocketPath(p.AgentSocket); err != nil {
		return fmt.Errorf("agentSocket: %w", err)
	}
	if len(p.Inbound)+len(p.Outbound) == 0 && p.Capture == nil {
		return errors.New("inbound, outbound, capture: at least one listener is needed")
	}
	if p.Capture != nil {
		if err := p.Capture.validate(); err != nil {
			return fmt.Errorf("capture.%w", err)
		}
	}
	if err := validateProbes(p.Probes); err != nil {
		return err
	}
	if err := p.Limits.validate(); err != nil {
		return err
	}
	if _, _, err := net.SplitHostPort(p.Admin); err != nil {
		return fmt.Errorf("admin: %w", err)
	}
	if _, _, err := net.SplitHostPort(p.Ready); err != nil && p.Ready != "" {
		return fmt.Errorf("ready: %w", err)
	}
	if p.DrainTimeout < 0 {
		return errors.New("drainTimeout: must not be negative")
	}
	for i, in := range p.Inbound {
		if _, _, err := net.SplitHostPort(in.Listen); err != nil {
			return fmt.Errorf("inbound[%d].listen: %w", i, err)
		}
		if _, _, err := net.SplitHostPort(in.App); err != nil {
			return fmt.Errorf("inbound[%d].app: %w", i, err)
		}
	}
	for i, out := range p.Outbound {
		if _, _, err := net.SplitHostPort(out.Listen); err != nil {
			return fmt.Errorf("outbound[%d].listen: %w", i, err)
		}
		if ns, name, ok := strings.Cut(out.Service, "/"); !ok || ns == "" || name == "" || strings.Contains(name, "/") {
			return fmt.Errorf("outbound[%d].service: %q, want NAMESPACE/NAME", i, out.Service)
		}
	}
	return p.Log.validate()
}

// validate refuses what would turn a bound off.
func (l *ProxyLimits) validate() error {
	for _, n := range []struct {
		field string
		value int64
	}{
		{"maxHeaderBytes", int64(l.MaxHeaderBytes)}, {"maxConnections", int64(l.MaxConnections)}, {"maxPerSource", int64(l.MaxPerSource)},
		{"maxHandshakes", int64(l.MaxHandshakes)}, {"maxStreams", int64(l.MaxStreams)},
		{"handshakeTimeout", int64(l.HandshakeTimeout)}, {"headerTimeout", int64(l.HeaderTimeout)}, {"idleTimeout", int64(l.IdleTimeout)},
		{"connectTimeout", int64(l.ConnectTimeout)}, {"responseTimeout", int64(l.ResponseTimeout)}, {"streamIdleTimeout", int64(l.StreamIdleTimeout)},
	} {
		if n.value < 0 {
			return fmt.Errorf("limits.%s: must not be negative", n.field)
		}
	}
	return nil
}

// perConnection is what an idle connection of mutual TLS and its buffers take, some
// 40 KiB, with as much again for the collector, and a part of what the program takes.
const perConnection = 96 << 10

// maxInFlight is InFlight where no limit of memory is known.
const maxInFlight = 256 << 20

// Fit lowers the bounds on connections to what bytes of memory hold, and gives requests
// in flight a third of them; 0 is any amount. A proxy that is ended for want of memory serves
// nobody.
func (l *ProxyLimits) Fit(bytes int64) {
	if bytes > 0 {
		l.inFlight = max(bytes/3, 1)
	}
	if most := bytes / perConnection; most > 0 && int64(l.MaxConnections) > most {
		l.MaxConnections = int(most)
		l.MaxPerSource = min(l.MaxPerSource, max(l.MaxConnections/3, 1))
	}
}

// InFlight is how many bytes inbound requests in flight may hold: a third of what Fit was given.
func (l *ProxyLimits) InFlight() int64 {
	if l.inFlight == 0 {
		return maxInFlight
	}
	return l.inFlight
}

func (l *ProxyLimits) setDefaults() {
	setDefault(&l.MaxHeaderBytes, 32<<10)
	setDefault(&l.MaxConnections, 8000)
	setDefault(&l.MaxPerSource, 2500)
	setDefault(&l.MaxHandshakes, 256)
	setDefault(&l.MaxStreams, 100)
	setDefault(&l.HandshakeTimeout, Duration(5*time.Second))
	setDefault(&l.HeaderTimeout, Duration(10*time.Second))
	setDefault(&l.IdleTimeout, Duration(5*time.Minute))
	setDefault(&l.ConnectTimeout, Duration(5*time.Second))
	setDefault(&l.ResponseTimeout, Duration(time.Minute))
	setDefault(&l.StreamIdleTimeout, Duration(5*time.Minute))
}
