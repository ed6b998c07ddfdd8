package webhook

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"

	"castellan.dev/internal/config"
)

// Ports of the sidecar (those users of Istio know).
const (
	portOutbound = 15001
	portInbound  = 15006
	portAdmin    = 15020
	portReady    = 15021
)

const (
	// maxAnnotation bounds a value that is parsed.
	maxAnnotation = 16 << 10
	// maxWarnings of one answer; the API server passes on few.
	maxWarnings = 10
)

// options is everything about one pod's sidecar, typed.
type options struct {
	image      string
	pullPolicy corev1.PullPolicy
	resources  corev1.ResourceRequirements
	logLevel   string
	drain      config.Duration
	native     bool
	hold       bool
	rewrite    bool
	readiness  corev1.Probe // its timings only
	capture    config.Capture
	// noInbound and noOutbound: an annotation says that nothing is captured that way.
	noInbound, noOutbound bool
	// sockets names the containers that get the workload's socket; all is for every one.
	sockets    []string
	allSockets bool

	warnings []string
}

func (o *options) warnf(format string, args ...any) {
	o.warnings = append(o.warnings, fmt.Sprintf(format, args...))
}

// defaults are the options of a pod without annotations.
func (in *Injector) defaults() *options {
	c := in.cfg
	o := &options{
		image:      c.Image,
		pullPolicy: corev1.PullPolicy(c.ImagePullPolicy),
		resources:  *in.resources.DeepCopy(),
		logLevel:   c.LogLevel,
		drain:      c.DrainTimeout,
		native:     config.On(c.NativeSidecar, true),
		hold:       c.HoldApplication,
		rewrite:    config.On(c.RewriteProbes, true),
		readiness:  corev1.Probe{TimeoutSeconds: 3, PeriodSeconds: 5, SuccessThreshold: 1, FailureThreshold: 3},
	}
	o.capture = config.Capture{
		ExcludeInboundPorts:     slices.Clone(c.Capture.ExcludeInboundPorts),
		ExcludeOutboundPorts:    slices.Clone(c.Capture.ExcludeOutboundPorts),
		IncludeOutboundIPRanges: slices.Clone(c.Capture.IncludeOutboundIPRanges),
		ExcludeOutboundIPRanges: slices.Clone(c.Capture.ExcludeOutboundIPRanges),
	}
	if len(o.capture.IncludeOutboundIPRanges) == 0 {
		o.capture.IncludeOutboundIPRanges = []string{"*"}
	}
	return o
}

// options reads the pod's annotations, in the order of their names.
func (in *Injector) options(pod *corev1.Pod) (*options, error) {
	o := in.defaults()
	set := o.setters()
	for _, name := range slices.Sorted(maps.Keys(pod.Annotations)) {
		value := pod.Annotations[name]
		apply, known := set[name]
		switch {
		case known && len(value) > maxAnnotation:
			return nil, refusef("annotation "+name, "", "%d bytes long, at most %d are read", len(value), maxAnnotation)
		case known:
			if err := apply(value); err != nil {
				return nil, &Refusal{Field: "annotation " + name, Value: value, Reason: err.Error()}
			}
		case meantForUs(name):
			o.warnf("annotation %s is not known to Castellan and changes nothing", shorten(name))
		}
	}
	if err := o.finish(pod); err != nil {
		return nil, err
	}
	return o, nil
}

// meantForUs says which annotations somebody may rely on when we ignore them.
func meantForUs(name string) bool {
	domain, _, _ := strings.Cut(name, "/")
	switch domain {
	case "proxy.istio.io", "inject.istio.io", "prometheus.istio.io", "castellan.dev":
		return true
	}
	return domain == "sidecar.istio.io" && name != labelInject || strings.HasSuffix(domain, ".sidecar.istio.io")
}

// finish checks what no single annotation says.
func (o *options) finish(pod *corev1.Pod) error {
	for name, limit := range o.resources.Limits {
		if _, ok := o.resources.Requests[name]; !ok { // as the API server would have it
			setQuantity(&o.resources.Requests, name, limit)
		}
	}
	if err := checkResources(o.resources); err != nil {
		return refusef("annotations sidecar.istio.io/proxy{CPU,Memory}[Limit]", "", "%v", err)
	}
	if o.noOutbound = o.noOutbound && len(o.capture.IncludeOutboundPorts) == 0; !o.noOutbound {
		o.capture.Outbound = portOutbound
	}
	if !o.noInbound {
		o.capture.Inbound = portInbound
	}
	switch {
	case o.noInbound && o.noOutbound:
		return refusef("annotations traffic.sidecar.istio.io", "", `nothing would be captured; for no sidecar at all set the label %s: "false"`, labelInject)
	case o.noInbound:
		o.warnf("no port of this pod is captured: no policy is enforced at it, and the mesh cannot call it")
	}
	for _, port := range []string{fmt.Sprint(portAdmin), fmt.Sprint(portReady)} {
		if !slices.Contains(o.capture.ExcludeInboundPorts, port) {
			o.capture.ExcludeInboundPorts = append(o.capture.ExcludeInboundPorts, port)
		}
	}
	if o.hold && !o.native {
		o.warnf("without a native sidecar the proxy's container is only started first; nothing waits for it to be ready")
	}
	return o.checkSockets(pod)
}

// checkSockets: a name that is no container's would leave its owner without a socket.
func (o *options) checkSockets(pod *corev1.Pod) error {
	for _, name := range o.sockets {
		if findContainer(pod.Spec.Containers, name) == nil && findContainer(pod.Spec.InitContainers, name) == nil {
			return refusef("annotation "+annotationSocket, name, "the pod has no container of this name")
		}
	}
	return nil
}

func findContainer(list []corev1.Container, name string) *corev1.Container {
	for i := range list {
		if list[i].Name == name {
			return &list[i]
		}
	}
	return nil
}

// checkResources is what the API server would refuse with less of a hint.
func checkResources(r corev1.ResourceRequirements) error {
	for _, name := range []corev1.ResourceName{corev1.ResourceCPU, corev1.ResourceMemory} {
		request, asked := r.Requests[name]
		limit, limited := r.Limits[name]
		if asked && limited && request.Cmp(limit) > 0 {
			return fmt.Errorf("%s: the request %s is more than the limit %s", name, request.String(), limit.String())
		}
	}
	return nil
}

// annotate sets one quantity. Who sets the request or the limit of a resource
// decides about both: a default for the other could contradict it.
func (o *options) annotate(name corev1.ResourceName, limit bool, q resource.Quantity, seen map[corev1.ResourceName]bool) {
	if !seen[name] {
		seen[name] = true
		delete(o.resources.Requests, name)
		delete(o.resources.Limits, name)
	}
	if limit {
		setQuantity(&o.resources.Limits, name, q)
	} else {
		setQuantity(&o.resources.Requests, name, q)
	}
}
