package webhook

import (
	"errors"
	"fmt"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"castellan.dev/internal/config"
)

// Annotations that are named in more than one place. Names are Istio's, but for ours.
const (
	annotationStatus = "sidecar.istio.io/status"
	// annotationSocket gives application containers the workload's socket: "true" for
	// all of them, or their names. With it an application holds the pod's identity
	// and can go around the proxy.
	annotationSocket = "castellan.dev/workload-socket"
	annotationMirror = corev1.MirrorPodAnnotationKey
	annotationMain   = "kubectl.kubernetes.io/default-container"
)

type setter = func(value string) error

// setters say what each annotation changes. An error is the reason for which the
// pod is refused; what may be ignored safely is warned of instead.
func (o *options) setters() map[string]setter {
	seen := map[corev1.ResourceName]bool{}
	quantity := func(name corev1.ResourceName, limit bool) setter {
		return func(value string) error {
			q, err := parseQuantity(value)
			if err == nil {
				o.annotate(name, limit, q, seen)
			}
			return err
		}
	}
	return map[string]setter{
		"sidecar.istio.io/proxyImage":                           into(&o.image, parseImage),
		"sidecar.istio.io/proxyCPU":                             quantity(corev1.ResourceCPU, false),
		"sidecar.istio.io/proxyCPULimit":                        quantity(corev1.ResourceCPU, true),
		"sidecar.istio.io/proxyMemory":                          quantity(corev1.ResourceMemory, false),
		"sidecar.istio.io/proxyMemoryLimit":                     quantity(corev1.ResourceMemory, true),
		"sidecar.istio.io/logLevel":                             into(&o.logLevel, parseLogLevel),
		"sidecar.istio.io/nativeSidecar":                        into(&o.native, parseSwitch),
		"sidecar.istio.io/rewriteAppHTTPProbers":                into(&o.rewrite, parseSwitch),
		"sidecar.istio.io/interceptionMode":                     checkInterception,
		"readiness.status.sidecar.istio.io/initialDelaySeconds": into(&o.readiness.InitialDelaySeconds, secondsFrom(0)),
		"readiness.status.sidecar.istio.io/periodSeconds":       into(&o.readiness.PeriodSeconds, secondsFrom(1)),
		"readiness.status.sidecar.istio.io/failureThreshold":    into(&o.readiness.FailureThreshold, secondsFrom(1)),
		"traffic.sidecar.istio.io/includeInboundPorts":          o.includeInbound,
		"traffic.sidecar.istio.io/excludeInboundPorts":          into(&o.capture.ExcludeInboundPorts, parsePorts),
		"traffic.sidecar.istio.io/includeOutboundPorts":         into(&o.capture.IncludeOutboundPorts, parsePortsOrAll),
		"traffic.sidecar.istio.io/excludeOutboundPorts":         into(&o.capture.ExcludeOutboundPorts, parsePorts),
		"traffic.sidecar.istio.io/includeOutboundIPRanges":      o.includeOutbound,
		"traffic.sidecar.istio.io/excludeOutboundIPRanges":      into(&o.capture.ExcludeOutboundIPRanges, parseRanges),
		"traffic.sidecar.istio.io/kubevirtInterfaces":           refuseInterfaces,
		"istio.io/reroute-virtual-interfaces":                   refuseInterfaces,
		"inject.istio.io/templates":                             checkTemplates,
		"proxy.istio.io/config":                                 o.proxyConfig,
		"status.sidecar.istio.io/port":                          o.statusPort,
		"prometheus.istio.io/merge-metrics":                     o.mergeMetrics,
		annotationSocket:                                        o.socketFor,
		annotationStatus:                                        func(string) error { return nil }, // strip's
	}
}

// into makes a setter of a parser.
func into[T any](field *T, parse func(string) (T, error)) setter {
	return func(value string) error {
		v, err := parse(value)
		if err == nil {
			*field = v
		}
		return err
	}
}

// includeInbound: as with Istio an empty value means that no port is captured.
func (o *options) includeInbound(value string) error {
	ports, err := parsePortsOrAll(value)
	if err != nil {
		return err
	}
	o.noInbound = len(ports) == 0
	o.capture.IncludeInboundPorts = ports
	return nil
}

func (o *options) includeOutbound(value string) error {
	ranges, err := parseRangesOrAll(value)
	if err != nil {
		return err
	}
	o.noOutbound = len(ranges) == 0
	o.capture.IncludeOutboundIPRanges = ranges
	return nil
}

// checkInterception takes the one way there is. Another would be a promise about
// addresses, or about policy, that is not kept.
func checkInterception(value string) error {
	if value != "REDIRECT" {
		return errors.New("traffic is captured by REDIRECT only; leave the annotation out")
	}
	return nil
}

func refuseInterfaces(value string) error {
	if strings.TrimSpace(value) == "" {
		return nil
	}
	return errors.New("interfaces of virtual machines are not captured, so their traffic would go past policy")
}

func checkTemplates(value string) error {
	for name := range strings.SplitSeq(value, ",") {
		if strings.TrimSpace(name) != "sidecar" {
			return errors.New("sidecar is the only template there is")
		}
	}
	return nil
}

func (o *options) statusPort(value string) error {
	if value != fmt.Sprint(portAdmin) {
		o.warnf("annotation status.sidecar.istio.io/port changes nothing: health and metrics are at %d", portAdmin)
	}
	return nil
}

func (o *options) mergeMetrics(value string) error {
	on, err := parseSwitch(value)
	if on {
		o.warnf("metrics are not merged: scrape the application's port and the proxy's %d", portAdmin)
	}
	return err
}

func (o *options) socketFor(value string) error {
	if on, err := parseSwitch(value); err == nil {
		o.allSockets = on
		return nil
	}
	for name := range strings.SplitSeq(value, ",") {
		name = strings.TrimSpace(name)
		if name == "" {
			return errors.New(`want "true", "false" or the names of containers, separated by commas`)
		}
		o.sockets = append(o.sockets, name)
	}
	return nil
}

// drainDuration is ours for Istio's terminationDrainDuration.
func (o *options) drainDuration(value string) error {
	d, err := parseDuration(value)
	if err == nil {
		o.drain = config.Duration(d)
	}
	return err
}
