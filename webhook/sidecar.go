package webhook

import (
	"cmp"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"castellan.dev/internal/config"
)

const (
	proxyBinary = "/usr/bin/castellan-proxy"
	// startupSeconds is how long a pod waits for its identity and policy before the
	// proxy is restarted.
	startupSeconds = 600
	// maxDocument keeps the variable below what Linux lets a process be started with
	// (MAX_ARG_STRLEN, 128 KiB).
	maxDocument = 96 << 10
)

// proxyDocument is the proxy's configuration as it travels in a variable.
func proxyDocument(o *options, probes map[string]config.Probe) (string, error) {
	doc := config.Proxy{
		Header:       config.Header{APIVersion: config.APIVersion, Kind: "ProxyConfig"},
		AgentSocket:  socketPath,
		Capture:      &o.capture,
		Ready:        ":15021",
		Admin:        ":15020",
		Probes:       probes,
		DrainTimeout: o.drain,
		Log:          config.Log{Level: o.logLevel},
	}
	data, err := json.Marshal(doc)
	if err != nil {
		return "", refusef("spec", "", "the sidecar's configuration cannot be written: %v", err)
	}
	document := portable(string(data))
	if len(document) > maxDocument {
		return "", refusef("spec", "", "the sidecar's configuration is %d bytes long, at most %d fit: the pod has too many or too long probes", len(document), maxDocument)
	}
	// The proxy would refuse it too, but only once the pod runs.
	var check config.Proxy
	if err = json.Unmarshal([]byte(document), &check); err == nil {
		err = check.Validate()
	}
	if err != nil {
		return "", refusef("spec", "", "the proxy would refuse its configuration: %v", err)
	}
	return document, nil
}

// portable writes characters of JSON's strings otherwise that others on the way to
// the proxy read as something else: the dollar, as the kubelet expands $(NAME) in
// values, and what YAML, which the proxy reads, takes for breaks or refuses.
func portable(document string) string {
	var b strings.Builder
	for _, r := range document {
		switch {
		case r == '$', 0x7f <= r && r <= 0x9f, r == 0xfeff, r == 0xfffe, r == 0xffff:
			fmt.Fprintf(&b, `\u%04x`, r)
		default:
			b.WriteRune(r)
		}
	}
	return b.String()
}

// addContainers puts the init step and the proxy where they must stand.
//
// A native sidecar starts before the other init containers, which therefore have
// the network of the mesh. Otherwise the proxy runs beside the application only,
// so that traffic is captured last, after all init containers have gone without it.
func addContainers(p *corev1.Pod, o *options, document string) {
	capture, proxy := initStep(o, document), proxyContainer(o, document)
	if o.native {
		always := corev1.ContainerRestartPolicyAlways
		proxy.RestartPolicy = &always
		p.Spec.InitContainers = slices.Insert(p.Spec.InitContainers, 0, capture, proxy)
		return
	}
	p.Spec.InitContainers = append(p.Spec.InitContainers, capture)
	if o.hold {
		p.Spec.Containers = slices.Insert(p.Spec.Containers, 0, proxy)
	} else {
		p.Spec.Containers = append(p.Spec.Containers, proxy)
	}
}

// container is what both have in common. Everything that the API server would fill
// in stands here already, so that an injected pod that is read back and created
// anew is found unchanged.
func container(name string, o *options, document string, args ...string) corev1.Container {
	return corev1.Container{
		Name:                     name,
		Image:                    o.image,
		ImagePullPolicy:          o.pullPolicy,
		Command:                  []string{proxyBinary},
		Args:                     append(args, "-config-env", envConfig),
		Env:                      []corev1.EnvVar{{Name: envConfig, Value: document}},
		Resources:                *o.resources.DeepCopy(),
		TerminationMessagePath:   corev1.TerminationMessagePathDefault,
		TerminationMessagePolicy: corev1.TerminationMessageFallbackToLogsOnError,
		// Kubernetes mounts the pod's token into every container that has nothing at its
		// place. The proxy, which strangers talk to, has no use for it.
		VolumeMounts: []corev1.VolumeMount{{Name: volumeNoToken, MountPath: tokenDir, ReadOnly: true}},
	}
}

// initStep programs the capture: root with the one capability that takes, and gone
// before anything else runs.
func initStep(o *options, document string) corev1.Container {
	c := container(containerInit, o, document, "capture")
	c.SecurityContext = confined(0)
	c.SecurityContext.Capabilities.Add = []corev1.Capability{"NET_ADMIN"}
	return c
}

func proxyContainer(o *options, document string) corev1.Container {
	c := container(containerProxy, o, document)
	c.SecurityContext = confined(config.ProxyUID)
	c.VolumeMounts = slices.Insert(c.VolumeMounts, 0, corev1.VolumeMount{Name: volumeSocket, MountPath: socketDir, ReadOnly: true})
	c.Ports = []corev1.ContainerPort{{Name: "proxy-metrics", ContainerPort: portAdmin, Protocol: corev1.ProtocolTCP}}
	ready := corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: "/healthz/ready", Port: intstr.FromInt32(portReady), Scheme: corev1.URISchemeHTTP}}
	// The application waits for this one: it does not start without identity and policy.
	c.StartupProbe = &corev1.Probe{ProbeHandler: ready, TimeoutSeconds: 3, PeriodSeconds: 1, SuccessThreshold: 1, FailureThreshold: startupSeconds}
	c.ReadinessProbe = o.readiness.DeepCopy()
	c.ReadinessProbe.ProbeHandler = *ready.DeepCopy()
	return c
}

// confined is the security context of both, as uid and gid.
func confined(id int64) *corev1.SecurityContext {
	no, yes, nonRoot := false, true, id != 0
	return &corev1.SecurityContext{
		RunAsUser:                &id,
		RunAsGroup:               &id,
		RunAsNonRoot:             &nonRoot,
		Privileged:               &no,
		AllowPrivilegeEscalation: &no,
		ReadOnlyRootFilesystem:   &yes,
		Capabilities:             &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}},
		SeccompProfile:           &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault},
	}
}

// noToken stands in the place of the pod's token in our containers. It holds what
// else Kubernetes puts there, the name of the namespace. An emptyDir would count as
// local data, which keeps pods from being drained and nodes from being scaled down.
func noToken() corev1.Volume {
	mode := int32(0o444)
	return corev1.Volume{Name: volumeNoToken, VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{
		DefaultMode: &mode,
		Sources: []corev1.VolumeProjection{{DownwardAPI: &corev1.DownwardAPIProjection{Items: []corev1.DownwardAPIVolumeFile{
			{Path: "namespace", FieldRef: &corev1.ObjectFieldSelector{APIVersion: "v1", FieldPath: "metadata.namespace"}},
		}}}},
	}}}
}

// addVolumes puts each of ours where it stands already, or last.
func addVolumes(p *corev1.Pod) {
	readOnly := true
	for _, v := range []corev1.Volume{
		{Name: volumeSocket, VolumeSource: corev1.VolumeSource{CSI: &corev1.CSIVolumeSource{Driver: csiDriver, ReadOnly: &readOnly}}},
		noToken(),
	} {
		if i := slices.IndexFunc(p.Spec.Volumes, func(have corev1.Volume) bool { return have.Name == v.Name }); i >= 0 {
			p.Spec.Volumes[i] = v
		} else {
			p.Spec.Volumes = append(p.Spec.Volumes, v)
		}
	}
}

// status is what the annotation says, in Istio's form and with whose it is.
type status struct {
	InitContainers   []string `json:"initContainers"`
	Containers       []string `json:"containers"`
	Volumes          []string `json:"volumes"`
	ImagePullSecrets []string `json:"imagePullSecrets"`
	Revision         string   `json:"revision"`
	Injector         string   `json:"injector,omitempty"`
}

// injectorName tells our status from Istio's.
const injectorName = "castellan.dev"

func addStatus(p *corev1.Pod, o *options, cfg config.Inject) {
	s := status{
		InitContainers: []string{containerInit}, Volumes: []string{volumeSocket, volumeNoToken},
		ImagePullSecrets: cfg.ImagePullSecrets, Revision: cfg.Revision, Injector: injectorName,
	}
	if o.native {
		s.InitContainers = append(s.InitContainers, containerProxy)
	} else {
		s.Containers = []string{containerProxy}
	}
	// It holds strings only.
	data, _ := json.Marshal(s)
	setString(&p.Annotations, annotationStatus, string(data))
}

func setString(m *map[string]string, key, value string) {
	if *m == nil {
		*m = map[string]string{}
	}
	(*m)[key] = value
}

// strip takes out what an earlier injection of ours put in, so that it can be put
// in anew. What another injector did is not ours to undo.
func strip(p *corev1.Pod) error {
	value, ok := p.Annotations[annotationStatus]
	if !ok {
		return restoreProbes(p, nil)
	}
	var s status
	if len(value) > maxAnnotation || json.Unmarshal([]byte(value), &s) != nil || s.Injector != injectorName {
		return refusef("annotation "+annotationStatus, value, "another injector has been here; let one injector select the pod, and create it from its original")
	}
	proxy := cmp.Or(findContainer(p.Spec.InitContainers, containerProxy), findContainer(p.Spec.Containers, containerProxy))
	var probes map[string]config.Probe
	if proxy != nil {
		for _, e := range proxy.Env {
			if e.Name != envConfig {
				continue
			}
			var doc config.Proxy
			if len(e.Value) > maxDocument || config.Unmarshal([]byte(e.Value), &doc) != nil || doc.Validate() != nil {
				return refusef("variable "+envConfig, "", "it was changed since it was injected; create the pod from its original")
			}
			probes = doc.Probes
		}
	}
	if err := restoreProbes(p, probes); err != nil {
		return err
	}
	ours := func(c corev1.Container) bool { return ourContainer(c.Name) }
	p.Spec.InitContainers = slices.DeleteFunc(p.Spec.InitContainers, ours)
	p.Spec.Containers = slices.DeleteFunc(p.Spec.Containers, ours)
	delete(p.Annotations, annotationStatus)
	return nil
}
