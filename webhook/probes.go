package webhook

import (
	"cmp"
	"fmt"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"castellan.dev/internal/config"
)

// probe is one probe of a container, and the path the proxy answers it at.
type probe struct {
	path string
	spec *corev1.Probe
}

// probesOf lists the probes of a container.
func probesOf(c *corev1.Container) []probe {
	var out []probe
	for _, p := range []probe{{"livez", c.LivenessProbe}, {"readyz", c.ReadinessProbe}, {"startupz", c.StartupProbe}} {
		if p.spec != nil {
			p.path = config.ProbePrefix + c.Name + "/" + p.path
			out = append(out, p)
		}
	}
	return out
}

// applications visits every container that is not ours.
func applications(p *corev1.Pod, visit func(*corev1.Container) error) error {
	for _, list := range [][]corev1.Container{p.Spec.InitContainers, p.Spec.Containers} {
		for i := range list {
			if ourContainer(list[i].Name) {
				continue
			}
			if err := visit(&list[i]); err != nil {
				return err
			}
		}
	}
	return nil
}

// rewriteProbes sends the kubelet to the proxy for every probe over the network:
// under STRICT the kubelet's plaintext would be refused by the proxy that guards
// the port. It returns what the proxy is to ask in its place. Hooks of the
// lifecycle are left alone: whoever reaches the proxy's port could set them off.
func rewriteProbes(p *corev1.Pod, o *options) (map[string]config.Probe, error) {
	probes := map[string]config.Probe{}
	err := applications(p, func(c *corev1.Container) error {
		warnOfHooks(c, o)
		if !o.rewrite {
			return nil
		}
		for _, pr := range probesOf(c) {
			asked, ok := o.convert(c, pr.spec)
			if !ok {
				continue
			}
			probes[pr.path] = asked
			pr.spec.ProbeHandler = corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{
				Path: pr.path, Port: intstr.FromInt32(portAdmin), Scheme: corev1.URISchemeHTTP,
			}}
		}
		return nil
	})
	return probes, err
}

func warnOfHooks(c *corev1.Container, o *options) {
	if c.Lifecycle == nil {
		return
	}
	for _, h := range []struct {
		name    string
		handler *corev1.LifecycleHandler
	}{{"postStart", c.Lifecycle.PostStart}, {"preStop", c.Lifecycle.PreStop}} {
		if h.handler != nil && (h.handler.HTTPGet != nil || h.handler.TCPSocket != nil) {
			o.warnf("container %s: the %s hook is plaintext from the node; where mTLS is STRICT it fails: use exec", shorten(c.Name), h.name)
		}
	}
}

// convert says what the proxy is to ask. Probes that run inside the container, and
// those of another host, are the kubelet's own business.
func (o *options) convert(c *corev1.Container, spec *corev1.Probe) (config.Probe, bool) {
	out := config.Probe{TimeoutSeconds: min(max(spec.TimeoutSeconds, 1), maxSeconds)}
	resolve := func(p intstr.IntOrString) (uint16, bool) {
		port, ok := resolvePort(c, p)
		if !ok {
			o.warnf("container %s: a probe names the port %q, which it does not declare", shorten(c.Name), shorten(p.String()))
		}
		return port, ok && port != portAdmin && port != portReady // not captured, so never refused
	}
	switch {
	case spec.HTTPGet != nil && spec.HTTPGet.Host == "":
		port, ok := resolve(spec.HTTPGet.Port)
		out.HTTPGet = httpProbe(spec.HTTPGet, port)
		return out, ok
	case spec.TCPSocket != nil && spec.TCPSocket.Host == "":
		port, ok := resolve(spec.TCPSocket.Port)
		out.TCPSocket = &config.TCPProbe{Port: port}
		return out, ok
	case spec.GRPC != nil:
		port, ok := resolve(intstr.FromInt32(spec.GRPC.Port))
		out.GRPC = &config.GRPCProbe{Port: port}
		if spec.GRPC.Service != nil {
			out.GRPC.Service = *spec.GRPC.Service
		}
		return out, ok
	default:
		return out, false
	}
}

func httpProbe(a *corev1.HTTPGetAction, port uint16) *config.HTTPProbe {
	path := cmp.Or(a.Path, "/")
	if !strings.HasPrefix(path, "/") {
		path = "/" + path // as the kubelet asks for it
	}
	h := &config.HTTPProbe{Path: path, Port: port, Scheme: cmp.Or(string(a.Scheme), string(corev1.URISchemeHTTP))}
	for _, header := range a.HTTPHeaders {
		h.HTTPHeaders = append(h.HTTPHeaders, config.ProbeHeader{Name: header.Name, Value: header.Value})
	}
	return h
}

// resolvePort reads a port as the kubelet does: by the container's own names.
func resolvePort(c *corev1.Container, p intstr.IntOrString) (uint16, bool) {
	number := p.IntVal
	if p.Type == intstr.String {
		number = 0
		for _, port := range c.Ports {
			if port.Name == p.StrVal {
				number = port.ContainerPort
			}
		}
		if n, err := strconv.ParseUint(p.StrVal, 10, 16); number == 0 && err == nil {
			number = int32(n)
		}
	}
	if number <= 0 || number > 65535 {
		return 0, false
	}
	return uint16(number), true
}

// restoreProbes undoes rewriteProbes with what the sidecar's document says. A
// probe of ours that it does not know would never succeed.
func restoreProbes(p *corev1.Pod, probes map[string]config.Probe) error {
	return applications(p, func(c *corev1.Container) error {
		for _, pr := range probesOf(c) {
			h := pr.spec.HTTPGet
			if h == nil || h.Port != intstr.FromInt32(portAdmin) || h.Path != pr.path {
				continue
			}
			asked, ok := probes[pr.path]
			if !ok {
				return refusef("container "+shorten(c.Name), "", "the probe %s was rewritten by an injector, but what it asked is lost; create the pod from its original", shorten(pr.path))
			}
			pr.spec.ProbeHandler = handlerOf(asked)
		}
		return nil
	})
}

func handlerOf(p config.Probe) corev1.ProbeHandler {
	switch {
	case p.HTTPGet != nil:
		h := &corev1.HTTPGetAction{Path: p.HTTPGet.Path, Port: intstr.FromInt32(int32(p.HTTPGet.Port)), Scheme: corev1.URIScheme(p.HTTPGet.Scheme)}
		for _, header := range p.HTTPGet.HTTPHeaders {
			h.HTTPHeaders = append(h.HTTPHeaders, corev1.HTTPHeader{Name: header.Name, Value: header.Value})
		}
		return corev1.ProbeHandler{HTTPGet: h}
	case p.TCPSocket != nil:
		return corev1.ProbeHandler{TCPSocket: &corev1.TCPSocketAction{Port: intstr.FromInt32(int32(p.TCPSocket.Port))}}
	default:
		return corev1.ProbeHandler{GRPC: &corev1.GRPCAction{Port: int32(p.GRPC.Port), Service: &p.GRPC.Service}}
	}
}

// shareSocket gives the containers that the annotation names the workload's socket.
func shareSocket(p *corev1.Pod, o *options) error {
	return applications(p, func(c *corev1.Container) error {
		wanted := o.allSockets && findContainer(p.Spec.Containers, c.Name) != nil
		for _, name := range o.sockets {
			wanted = wanted || name == c.Name
		}
		if !wanted {
			return nil
		}
		mount := corev1.VolumeMount{Name: volumeSocket, MountPath: socketDir, ReadOnly: true}
		for _, m := range c.VolumeMounts {
			if m.MountPath == socketDir {
				if m.Name == volumeSocket {
					return nil
				}
				return refusef(fmt.Sprintf("volumeMounts of container %s", shorten(c.Name)), m.MountPath, "annotation %s wants the workload's socket here; mount %s elsewhere", annotationSocket, shorten(m.Name))
			}
		}
		c.VolumeMounts = append(c.VolumeMounts, mount)
		for _, e := range c.Env {
			if e.Name == envSocket {
				return nil
			}
		}
		c.Env = append(c.Env, corev1.EnvVar{Name: envSocket, Value: "unix://" + socketPath})
		return nil
	})
}
