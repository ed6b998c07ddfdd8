package kube

import (
	"strings"

	corev1 "k8s.io/api/core/v1"
)

// protocolOf is what a service says its port speaks: appProtocol if it has one,
// else the port's name up to the first hyphen, as Istio reads both. Empty where
// that says nothing, and then the receiver goes by the first bytes.
func protocolOf(p *corev1.ServicePort) string {
	name := strings.ToLower(p.Name)
	if p.AppProtocol != nil {
		name = strings.ToLower(*p.AppProtocol)
		switch name { // of Kubernetes' own
		case "kubernetes.io/h2c":
			return "http2"
		case "kubernetes.io/ws":
			return "http"
		case "kubernetes.io/wss":
			return "https"
		}
	}
	if strings.HasPrefix(name, "grpc-web") {
		return "http" // spoken over HTTP/1.1 too
	}
	name, _, _ = strings.Cut(name, "-")
	switch name {
	case "http", "http2", "grpc", "https", "tls", "tcp":
		return name
	case "mongo", "mysql", "redis":
		return "tcp" // Istio's names for what is told apart no further here
	}
	switch p.Port {
	case 25, 53, 3306, 27017:
		// Servers that speak first, or wait for few bytes: to wait for the client's
		// would hang.
		return "tcp"
	}
	return ""
}

// isTCP: no protocol means TCP. Others do not pass a proxy.
func isTCP(p corev1.Protocol) bool { return p == "" || p == corev1.ProtocolTCP }
