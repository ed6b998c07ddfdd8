package config

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// ProbePrefix begins the paths at which the proxy answers the application's probes.
const ProbePrefix = "/app-health/"

const (
	// maxProbes bounds the probes of one pod: three of each container.
	maxProbes       = 128
	maxProbeHeaders = 64
	maxProbeSeconds = 3600
)

// Probe is one of the application's probes, which the kubelet asks of the proxy
// and the proxy of the application: the kubelet has no certificate. Exactly one of
// its three kinds is set; they are as in Kubernetes, with ports by number and
// always of the pod itself.
type Probe struct {
	HTTPGet   *HTTPProbe `json:"httpGet,omitempty"`
	TCPSocket *TCPProbe  `json:"tcpSocket,omitempty"`
	GRPC      *GRPCProbe `json:"grpc,omitempty"`
	// TimeoutSeconds is default 1.
	TimeoutSeconds int32 `json:"timeoutSeconds,omitempty"`
}

// HTTPProbe is good when it is answered with a status from 200 to 399.
type HTTPProbe struct {
	// Path may have a query; default "/".
	Path string `json:"path,omitempty"`
	Port uint16 `json:"port"`
	// Scheme is HTTP or HTTPS; default HTTP. Certificates are not verified.
	Scheme      string        `json:"scheme,omitempty"`
	HTTPHeaders []ProbeHeader `json:"httpHeaders,omitempty"`
}

// ProbeHeader is one header field of an HTTPProbe.
type ProbeHeader struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

// TCPProbe is good when the port can be connected to.
type TCPProbe struct {
	Port uint16 `json:"port"`
}

// GRPCProbe is good when grpc.health.v1 says SERVING of the service.
type GRPCProbe struct {
	Port    uint16 `json:"port"`
	Service string `json:"service,omitempty"`
}

func validateProbes(probes map[string]Probe) error {
	if len(probes) > maxProbes {
		return fmt.Errorf("probes: %d, at most %d are taken", len(probes), maxProbes)
	}
	for _, path := range slices.Sorted(maps.Keys(probes)) {
		if rest, ok := strings.CutPrefix(path, ProbePrefix); !ok || rest == "" || strings.ContainsAny(path, "?#%{} ") {
			return fmt.Errorf("probes[%q]: want a path below %s", path, ProbePrefix)
		}
		p := probes[path]
		if err := p.validate(); err != nil {
			return fmt.Errorf("probes[%q].%w", path, err)
		}
		probes[path] = p
	}
	return nil
}

func (p *Probe) validate() error {
	setDefault(&p.TimeoutSeconds, 1)
	if p.TimeoutSeconds < 0 || p.TimeoutSeconds > maxProbeSeconds {
		return fmt.Errorf("timeoutSeconds: %d, want 1 to %d", p.TimeoutSeconds, maxProbeSeconds)
	}
	kinds := 0
	kind := func(name string, port uint16) error {
		if kinds++; port == 0 {
			return fmt.Errorf("%s.port: required", name)
		}
		return nil
	}
	var errs []error
	if p.HTTPGet != nil {
		errs = append(errs, kind("httpGet", p.HTTPGet.Port), p.HTTPGet.validate())
	}
	if p.TCPSocket != nil {
		errs = append(errs, kind("tcpSocket", p.TCPSocket.Port))
	}
	if p.GRPC != nil {
		errs = append(errs, kind("grpc", p.GRPC.Port))
	}
	if kinds != 1 {
		return errors.New("httpGet: set exactly one of httpGet, tcpSocket and grpc")
	}
	return cmp.Or(errs...)
}

func (p *HTTPProbe) validate() error {
	setDefault(&p.Path, "/")
	setDefault(&p.Scheme, "HTTP")
	switch {
	case p.Scheme != "HTTP" && p.Scheme != "HTTPS":
		return fmt.Errorf("httpGet.scheme: %q, want HTTP or HTTPS", p.Scheme)
	case len(p.HTTPHeaders) > maxProbeHeaders:
		return fmt.Errorf("httpGet.httpHeaders: %d, at most %d are taken", len(p.HTTPHeaders), maxProbeHeaders)
	}
	for i, h := range p.HTTPHeaders {
		if h.Name == "" {
			return fmt.Errorf("httpGet.httpHeaders[%d].name: required", i)
		}
	}
	return nil
}
