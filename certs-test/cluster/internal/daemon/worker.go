package daemon

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"castellan.dev/certs-test/cluster/internal/layout"
)

// runtime starts what a node runs containers with: before the kubelet, which gives up
// without it, and with the image that each pod needs.
func (d *daemon) runtime(ctx context.Context, n *node) error {
	if err := d.workerFiles(n); err != nil {
		return err
	}
	if err := d.parts.add(ctx, d.containerd(n)); err != nil {
		return err
	}
	return run(n.inside("ctr", "-n", "k8s.io", "images", "import", d.opts.Path("pause.tar"))...)
}

// containerdConfig: oom scores may not be lowered without CAP_SYS_RESOURCE, which
// root lacks on some machines, and then no sandbox would start.
const containerdConfig = `version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = %q
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "/var/lib/cni/net.d"
`

func (d *daemon) workerFiles(n *node) error {
	dir := d.etc(n.Name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "containerd.toml"), fmt.Appendf(nil, containerdConfig, layout.PauseImage), 0o644); err != nil {
		return err
	}
	if err := os.MkdirAll(n.path("/var/lib/cni/net.d"), 0o755); err != nil {
		return err
	}
	if err := writeJSON(n.path("/var/lib/cni/net.d/10-pods.conflist"), cniConfig(n)); err != nil {
		return err
	}
	if err := writeJSON(filepath.Join(dir, "kubelet.json"), d.kubeletConfig(n)); err != nil {
		return err
	}
	return writeJSON(filepath.Join(dir, "kube-proxy.json"), d.proxyConfig(n))
}

type object = map[string]any

func cniConfig(n *node) object {
	return object{
		"cniVersion": "1.0.0",
		"name":       "pods",
		"plugins": []object{
			{
				"type": "bridge", "bridge": "cni0", "isGateway": true, "hairpinMode": true, "ipMasq": false,
				"ipam": object{
					"type":   "host-local",
					"ranges": [][]object{{{"subnet": n.Pods4}}, {{"subnet": n.Pods6}}},
					"routes": []object{{"dst": "0.0.0.0/0"}, {"dst": "::/0"}},
				},
			},
			{"type": "portmap", "capabilities": object{"portMappings": true}},
		},
	}
}

func (d *daemon) kubeletConfig(n *node) object {
	return object{
		"apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
		"authentication": object{
			"anonymous": object{"enabled": false},
			"webhook":   object{"enabled": true, "cacheTTL": "2s"},
			"x509":      object{"clientCAFile": d.etc("ca.crt")},
		},
		"authorization":            object{"mode": "Webhook", "webhook": object{"cacheAuthorizedTTL": "2s", "cacheUnauthorizedTTL": "2s"}},
		"cgroupDriver":             "cgroupfs",
		"cgroupRoot":               d.opts.Cgroup() + "/" + n.Name,
		"clusterDNS":               []string{layout.Control4},
		"clusterDomain":            "cluster.local",
		"containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
		"enforceNodeAllocatable":   []string{},
		"evictionHard":             object{"memory.available": "50Mi", "nodefs.available": "1%", "imagefs.available": "1%", "nodefs.inodesFree": "1%"},
		"failCgroupV1":             false,
		"failSwapOn":               false,
		"featureGates":             d.opts.FeatureGates,
		"healthzBindAddress":       n.IP4,
		// Loaded images cannot be pulled again: never collect them.
		"imageGCHighThresholdPercent": 100,
		"nodeStatusUpdateFrequency":   "4s",
		"resolvConf":                  "",
		"tlsCertFile":                 d.etc(n.Name + ".crt"),
		"tlsPrivateKeyFile":           d.etc(n.Name + ".key"),
	}
}

func (d *daemon) proxyConfig(n *node) object {
	return object{
		"apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration",
		"bindAddress":        "0.0.0.0",
		"clientConnection":   object{"kubeconfig": d.etc("kube-proxy.conf")},
		"clusterCIDR":        layout.Pods4 + "," + layout.Pods6,
		"conntrack":          object{"maxPerCore": 0},
		"healthzBindAddress": hostPort(n.IP4, 10256),
		"hostnameOverride":   n.Name,
		"mode":               "nftables",
		"nftables":           object{"minSyncPeriod": "100ms", "syncPeriod": "30s"},
	}
}

func (d *daemon) containerd(n *node) part {
	return part{
		name: n.Name + "-containerd",
		args: n.inside("containerd", "--config", d.etc(n.Name, "containerd.toml")),
		ready: func(context.Context) error {
			c, err := net.Dial("unix", n.path("/run/containerd/containerd.sock"))
			if err != nil {
				return err
			}
			return c.Close()
		},
	}
}

func (d *daemon) kubelet(n *node) part {
	return part{
		name: n.Name + "-kubelet",
		args: n.inside(filepath.Join(d.opts.Kube, "kubelet"),
			"--config="+d.etc(n.Name, "kubelet.json"),
			"--hostname-override="+n.Name,
			"--kubeconfig="+d.etc(n.Name+".conf"),
			"--node-ip="+n.IP4+","+n.IP6,
		),
		ready: get("http://" + hostPort(n.IP4, 10248) + "/healthz"),
	}
}

func (d *daemon) proxy(n *node) part {
	return part{
		name:  n.Name + "-kube-proxy",
		args:  n.inside(filepath.Join(d.opts.Kube, "kube-proxy"), "--config="+d.etc(n.Name, "kube-proxy.json")),
		ready: get("http://" + hostPort(n.IP4, 10256) + "/healthz"),
	}
}
