package kube

import (
	"strings"
	"unique"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
)

const (
	// csiDriver is ours: a pod with a volume of it gets an identity.
	csiDriver = "csi.castellan.dev"
	// annotationAccounts declares who else may answer for a service (Istio's name).
	annotationAccounts = "alpha.istio.io/canonical-serviceaccounts"
)

// shared returns one copy of strings that thousands of objects repeat.
func shared(s string) string {
	if s == "" {
		return ""
	}
	return unique.Make(s).Value()
}

func sharedMap(m map[string]string) map[string]string {
	if len(m) == 0 {
		return nil
	}
	out := make(map[string]string, len(m))
	for k, v := range m {
		out[shared(k)] = shared(v)
	}
	return out
}

// reduceMeta keeps what tells objects and their versions apart.
func reduceMeta(m *metav1.ObjectMeta) metav1.ObjectMeta {
	return metav1.ObjectMeta{
		Name: m.Name, Namespace: shared(m.Namespace), UID: m.UID,
		ResourceVersion: m.ResourceVersion, Labels: sharedMap(m.Labels), DeletionTimestamp: m.DeletionTimestamp,
	}
}

// reducePod keeps of a pod what Informers.Pods says.
func reducePod(o runtime.Object) runtime.Object {
	p, ok := o.(*corev1.Pod)
	if !ok {
		return o
	}
	out := &corev1.Pod{
		ObjectMeta: reduceMeta(&p.ObjectMeta),
		Spec: corev1.PodSpec{NodeName: shared(p.Spec.NodeName), ServiceAccountName: shared(p.Spec.ServiceAccountName),
			HostNetwork: p.Spec.HostNetwork},
		Status: corev1.PodStatus{Phase: corev1.PodPhase(shared(string(p.Status.Phase))), PodIP: p.Status.PodIP},
	}
	for i := range p.Spec.Containers {
		c := &p.Spec.Containers[i]
		out.Spec.Containers = append(out.Spec.Containers, corev1.Container{Name: shared(c.Name), Ports: reducePorts(c.Ports)})
	}
	for i := range p.Spec.Volumes {
		if v := &p.Spec.Volumes[i]; v.CSI != nil && v.CSI.Driver == csiDriver {
			out.Spec.Volumes = append(out.Spec.Volumes, corev1.Volume{Name: shared(v.Name),
				VolumeSource: corev1.VolumeSource{CSI: &corev1.CSIVolumeSource{Driver: csiDriver}}})
		}
	}
	out.Status.PodIPs = append(out.Status.PodIPs, p.Status.PodIPs...)
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodReady {
			out.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionStatus(shared(string(c.Status)))}}
		}
	}
	return out
}

func reducePorts(ports []corev1.ContainerPort) []corev1.ContainerPort {
	var out []corev1.ContainerPort
	for _, p := range ports {
		out = append(out, corev1.ContainerPort{Name: shared(p.Name), ContainerPort: p.ContainerPort, Protocol: corev1.Protocol(shared(string(p.Protocol)))})
	}
	return out
}

func reduceAccount(o runtime.Object) runtime.Object {
	a, ok := o.(*corev1.ServiceAccount)
	if !ok {
		return o
	}
	m := reduceMeta(&a.ObjectMeta)
	m.Name, m.Labels = shared(m.Name), nil
	return &corev1.ServiceAccount{ObjectMeta: m}
}

func reduceNamespace(o runtime.Object) runtime.Object {
	n, ok := o.(*corev1.Namespace)
	if !ok {
		return o
	}
	return &corev1.Namespace{ObjectMeta: reduceMeta(&n.ObjectMeta)}
}

func reduceService(o runtime.Object) runtime.Object {
	s, ok := o.(*corev1.Service)
	if !ok {
		return o
	}
	out := &corev1.Service{ObjectMeta: reduceMeta(&s.ObjectMeta)}
	out.Labels = nil
	out.CreationTimestamp = s.CreationTimestamp
	if names, ok := s.Annotations[annotationAccounts]; ok {
		// One byte too many tells that it is too long.
		names = strings.Clone(names[:min(len(names), maxIdentitiesText+1)])
		out.Annotations = map[string]string{annotationAccounts: names}
	}
	out.Spec = corev1.ServiceSpec{Type: s.Spec.Type, Selector: sharedMap(s.Spec.Selector), ClusterIP: s.Spec.ClusterIP,
		ClusterIPs: append([]string(nil), s.Spec.ClusterIPs...), PublishNotReadyAddresses: s.Spec.PublishNotReadyAddresses}
	for i := range s.Spec.Ports[:min(len(s.Spec.Ports), maxServicePorts+1)] { // one too many tells
		p := &s.Spec.Ports[i]
		out.Spec.Ports = append(out.Spec.Ports, corev1.ServicePort{Name: shared(p.Name), Port: p.Port, Protocol: p.Protocol,
			AppProtocol: p.AppProtocol, TargetPort: p.TargetPort})
	}
	return out
}

func reduceSlice(o runtime.Object) runtime.Object {
	s, ok := o.(*discoveryv1.EndpointSlice)
	if !ok {
		return o
	}
	out := &discoveryv1.EndpointSlice{ObjectMeta: reduceMeta(&s.ObjectMeta), AddressType: s.AddressType}
	out.Labels = nil
	if name, ok := s.Labels[discoveryv1.LabelServiceName]; ok {
		out.Labels = map[string]string{discoveryv1.LabelServiceName: name}
	}
	for i := range s.Ports {
		p := &s.Ports[i]
		out.Ports = append(out.Ports, discoveryv1.EndpointPort{Name: p.Name, Protocol: p.Protocol, Port: p.Port})
	}
	for i := range s.Endpoints {
		e := &s.Endpoints[i]
		// The first address stands for all.
		kept := discoveryv1.Endpoint{Addresses: append([]string(nil), e.Addresses[:min(len(e.Addresses), 1)]...), Conditions: e.Conditions}
		if t := e.TargetRef; t != nil {
			kept.TargetRef = &corev1.ObjectReference{Kind: shared(t.Kind), Namespace: shared(t.Namespace), Name: t.Name, UID: t.UID}
		}
		out.Endpoints = append(out.Endpoints, kept)
	}
	return out
}

// The indexes. What has no key is in none.

func byUID(o any) ([]string, error) {
	if m, ok := o.(metav1.Object); ok && m.GetUID() != "" {
		return []string{string(m.GetUID())}, nil
	}
	return nil, nil
}

func byNode(o any) ([]string, error) {
	if p, ok := o.(*corev1.Pod); ok && p.Spec.NodeName != "" {
		return []string{p.Spec.NodeName}, nil
	}
	return nil, nil
}

// addresses are the pod's, the primary one first.
func addresses(p *corev1.Pod) []string {
	var out []string
	if p.Status.PodIP != "" {
		out = append(out, p.Status.PodIP)
	}
	for _, a := range p.Status.PodIPs {
		if a.IP != "" && a.IP != p.Status.PodIP {
			out = append(out, a.IP)
		}
	}
	return out
}

func byService(o any) ([]string, error) {
	s, ok := o.(*discoveryv1.EndpointSlice)
	if !ok || s.Labels[discoveryv1.LabelServiceName] == "" {
		return nil, nil
	}
	return []string{s.Namespace + "/" + s.Labels[discoveryv1.LabelServiceName]}, nil
}
