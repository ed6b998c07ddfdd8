package webhook

import (
	"fmt"
	"reflect"
	"slices"

	corev1 "k8s.io/api/core/v1"

	"castellan.dev/internal/config"
)

// Names in the pod. The containers are called as Istio calls its own, because
// that is how people's tools find a sidecar (logs, dashboards, exceptions in
// admission policies) and how two injectors find out about each other.
const (
	containerInit       = "istio-init"
	containerProxy      = "istio-proxy"
	containerValidation = "istio-validation"

	volumeSocket  = "workload-socket"
	volumeNoToken = "castellan-no-token"

	csiDriver  = "csi.castellan.dev"
	socketDir  = "/var/run/secrets/workload-spiffe-uds"
	socketPath = socketDir + "/socket"
	// tokenDir is where Kubernetes puts a pod's token for its API.
	tokenDir = "/var/run/secrets/kubernetes.io/serviceaccount"

	envSocket = "SPIFFE_ENDPOINT_SOCKET"
	envConfig = "CASTELLAN_PROXY_CONFIG"
)

func ourContainer(name string) bool { return name == containerInit || name == containerProxy }

// checkPod refuses pods in which the sidecar would not be what it promises.
func checkPod(p *corev1.Pod, o *options) error {
	if mode, ok := p.Labels[labelTLSMode]; ok && mode != tlsModeIstio {
		return refusef("label "+labelTLSMode, mode, `a pod with a sidecar always speaks mTLS; remove the label, or set %s: "false"`, labelInject)
	}
	if err := checkIDs("spec", p.Spec.SecurityContext); err != nil {
		return err
	}
	for _, list := range []struct {
		field      string
		containers []corev1.Container
	}{{"spec.initContainers", p.Spec.InitContainers}, {"spec.containers", p.Spec.Containers}} {
		for i := range list.containers {
			if err := checkContainer(fmt.Sprintf("%s[%d]", list.field, i), &list.containers[i], o); err != nil {
				return err
			}
		}
	}
	return checkVolumes(p, o)
}

func checkContainer(field string, c *corev1.Container, o *options) error {
	if ourContainer(c.Name) || c.Name == containerValidation {
		return refusef(field+".name", c.Name, "this name is the sidecar's; remove the container (another injector may have put it there)")
	}
	if s := c.SecurityContext; s != nil {
		if err := checkUser(field+".securityContext", s.RunAsUser, s.RunAsGroup); err != nil {
			return err
		}
	}
	for _, port := range c.Ports {
		switch port.ContainerPort {
		case portInbound, portOutbound, portAdmin, portReady:
			o.warnf("container %s declares port %d, which is the sidecar's: one of the two cannot listen", shorten(c.Name), port.ContainerPort)
		}
	}
	return nil
}

// checkIDs: a container that says nothing inherits the pod's.
func checkIDs(field string, s *corev1.PodSecurityContext) error {
	if s == nil {
		return nil
	}
	return checkUser(field+".securityContext", s.RunAsUser, s.RunAsGroup)
}

// checkUser keeps the proxy's uid and gid to the proxy: what runs as them is never
// captured, so that the proxy does not capture itself.
func checkUser(field string, user, group *int64) error {
	for _, id := range []struct {
		name  string
		value *int64
	}{{"runAsUser", user}, {"runAsGroup", group}} {
		if id.value != nil && *id.value == config.ProxyUID {
			return refusef(field+"."+id.name, fmt.Sprint(config.ProxyUID), "this id is the sidecar's, whose traffic goes past policy; choose another")
		}
	}
	return nil
}

// checkVolumes: a volume of one of our names must be what we would make of it.
func checkVolumes(p *corev1.Pod, o *options) error {
	ours := map[string]bool{}
	for i := range p.Spec.Volumes {
		v := &p.Spec.Volumes[i]
		isCSI := v.CSI != nil && v.CSI.Driver == csiDriver
		switch {
		case v.Name == volumeSocket && !isCSI, v.Name == volumeNoToken && !reflect.DeepEqual(*v, noToken()):
			return refusef(fmt.Sprintf("spec.volumes[%d].name", i), v.Name, "this name is the sidecar's; rename the volume")
		case isCSI:
			ours[v.Name] = true
		}
	}
	for _, c := range slices.Concat(p.Spec.InitContainers, p.Spec.Containers) {
		if slices.ContainsFunc(c.VolumeMounts, func(m corev1.VolumeMount) bool { return ours[m.Name] }) {
			o.warnf("container %s mounts the workload's socket: it can hold the pod's identity and go around the proxy", shorten(c.Name))
		}
	}
	return nil
}
