package daemon

import (
	"fmt"
	"path/filepath"
	"strings"

	"castellan.dev/certs-test/cluster/internal/layout"
)

// server is the API server's address inside the namespaces.
var server = "https://" + hostPort(layout.Control4, layout.APIPort)

func (d *daemon) etcd() part {
	return part{
		name: "etcd",
		args: []string{
			filepath.Join(d.opts.Etcd, "etcd"),
			"--data-dir", d.opts.Path("etcd"),
			"--listen-client-urls", "http://127.0.0.1:2379",
			"--advertise-client-urls", "http://127.0.0.1:2379",
			"--listen-peer-urls", "http://127.0.0.1:2380",
			"--unsafe-no-fsync",
			"--log-level", "warn",
		},
		ready: get("http://127.0.0.1:2379/readyz"),
	}
}

func (d *daemon) apiServer() part {
	return part{
		name: "kube-apiserver",
		args: append([]string{
			filepath.Join(d.opts.Kube, "kube-apiserver"),
			"--advertise-address=" + layout.Control4,
			"--allow-privileged",
			"--audit-log-path=" + d.opts.Path("logs", "audit.log"),
			"--audit-policy-file=" + d.etc("audit.yaml"),
			"--authorization-mode=Node,RBAC",
			"--cert-dir=" + d.etc(),
			"--client-ca-file=" + d.etc("ca.crt"),
			"--enable-admission-plugins=NodeRestriction",
			// There is no kube-proxy beside the API server: it finds the endpoints of
			// webhooks' services itself.
			"--enable-aggregator-routing",
			"--etcd-servers=http://127.0.0.1:2379",
			"--kubelet-certificate-authority=" + d.etc("ca.crt"),
			"--kubelet-client-certificate=" + d.etc("kubelet-client.crt"),
			"--kubelet-client-key=" + d.etc("kubelet-client.key"),
			"--kubelet-preferred-address-types=InternalIP",
			fmt.Sprintf("--secure-port=%d", layout.APIPort),
			"--service-account-issuer=https://kubernetes.default.svc.cluster.local",
			"--service-account-key-file=" + d.etc("sa.pub"),
			"--service-account-signing-key-file=" + d.etc("sa.key"),
			"--service-cluster-ip-range=" + layout.Services4 + "," + layout.Services6,
			"--tls-cert-file=" + d.etc("apiserver.crt"),
			"--tls-private-key-file=" + d.etc("apiserver.key"),
			"--token-auth-file=" + d.etc("tokens.csv"),
		}, d.switches()...),
		ready: d.api.ok("/readyz"),
	}
}

// auditPolicy records what pods ask of the API server, without the contents.
const auditPolicy = `apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
- level: None
  userGroups: ["system:serviceaccounts:kube-system"]
- level: Metadata
  userGroups: ["system:serviceaccounts"]
- level: None
`

// switches are the features asked for, as flags of the API server.
func (d *daemon) switches() []string {
	var gates, apis []string
	for name, on := range d.opts.FeatureGates {
		gates = append(gates, fmt.Sprintf("%s=%t", name, on))
	}
	for name, value := range d.opts.RuntimeConfig {
		apis = append(apis, name+"="+value)
	}
	var flags []string
	if len(gates) > 0 {
		flags = append(flags, "--feature-gates="+strings.Join(gates, ","))
	}
	if len(apis) > 0 {
		flags = append(flags, "--runtime-config="+strings.Join(apis, ","))
	}
	return flags
}

func (d *daemon) controllerManager() part {
	args := []string{
		filepath.Join(d.opts.Kube, "kube-controller-manager"),
		"--bind-address=127.0.0.1",
		"--cluster-signing-cert-file=" + d.etc("ca.crt"),
		"--cluster-signing-key-file=" + d.etc("ca.key"),
		// At the default rate its controllers take four seconds to get their tokens.
		"--kube-api-burst=1000",
		"--kube-api-qps=500",
		"--kubeconfig=" + d.etc("kube-controller-manager.conf"),
		"--leader-elect=false",
		"--root-ca-file=" + d.etc("ca.crt"),
		"--service-account-private-key-file=" + d.etc("sa.key"),
		"--use-service-account-credentials",
	}
	if flags := d.switches(); len(d.opts.FeatureGates) > 0 {
		args = append(args, flags[0])
	}
	return part{name: "kube-controller-manager", args: args, ready: getTLS("https://127.0.0.1:10257/healthz")}
}

func (d *daemon) scheduler() part {
	return part{
		name: "kube-scheduler",
		args: []string{
			filepath.Join(d.opts.Kube, "kube-scheduler"),
			"--bind-address=127.0.0.1",
			"--kubeconfig=" + d.etc("kube-scheduler.conf"),
			"--leader-elect=false",
		},
		ready: getTLS("https://127.0.0.1:10259/healthz"),
	}
}

// corefile answers for the cluster's own names, and for no other: there is nothing
// to forward to.
const corefile = `cluster.local in-addr.arpa ip6.arpa {
	bind %[1]s %[2]s
	errors
	ready %[1]s:8181
	kubernetes cluster.local in-addr.arpa ip6.arpa {
		kubeconfig %[3]s
	}
}
. {
	bind %[1]s %[2]s
	errors
	template ANY ANY {
		rcode NXDOMAIN
	}
}
`

func (d *daemon) dns() part {
	return part{
		name:  "coredns",
		args:  []string{filepath.Join(d.opts.CoreDNS, "coredns"), "-conf", d.etc("Corefile")},
		ready: get("http://" + hostPort(layout.Control4, 8181) + "/ready"),
	}
}
