package install

import (
	"context"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/version"
)

// preNodes: an agent needs Linux, and a proxy a kernel with nftables, on a platform
// that there are images for.
func (in *Installer) preNodes(ctx context.Context, _ *Rendered, out *results) {
	const check = "nodes"
	nodes, err := in.cfg.Kubernetes.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		out.unknown(check, err)
		return
	}
	fit := 0
	for i := range nodes.Items {
		node := &nodes.Items[i]
		info := node.Status.NodeInfo
		kernel, err := version.ParseGeneric(info.KernelVersion)
		switch {
		case info.OperatingSystem != "linux":
			out.warn(check, "workloads there stay outside the mesh", "%s runs %s and gets no agent", node.Name, info.OperatingSystem)
		case info.Architecture != "amd64" && info.Architecture != "arm64":
			out.fail(check, "there are images for amd64 and arm64: keep the agent from it by agent.nodeSelector", "%s is %s", node.Name, info.Architecture)
		case err == nil && kernel.LessThan(version.MustParseGeneric("5.4")):
			out.warn(check, "traffic capture needs nftables of Linux 5.4 or later", "%s runs Linux %s", node.Name, info.KernelVersion)
		default:
			fit++
		}
	}
	if fit == 0 {
		out.fail(check, "add a Linux node", "none can run an agent")
		return
	}
	out.ok(check, "%d of %d can run an agent", fit, len(nodes.Items))
}

const defaultClass = "storageclass.kubernetes.io/is-default-class"

// preVolume: the claim of the ledger can be met.
func (in *Installer) preVolume(ctx context.Context, r *Rendered, out *results) {
	const check = "ledger's volume"
	name := claimName(r)
	live, err := in.get(ctx, ref{Kind: "PersistentVolumeClaim", Namespace: in.cfg.Namespace, Name: name})
	if err != nil {
		out.unknown(check, err)
		return
	}
	claim := find(r, "PersistentVolumeClaim", name)
	switch {
	case live != nil:
		out.ok(check, "the claim %s exists", name)
		return
	case claim == nil:
		out.fail(check, "make it, or leave ledger.existingClaim empty", "the claim %s does not exist in namespace %s", name, in.cfg.Namespace)
		return
	}
	classes, err := in.cfg.Kubernetes.StorageV1().StorageClasses().List(ctx, metav1.ListOptions{})
	if err != nil {
		out.unknown(check, err)
		return
	}
	want, _, _ := unstructured.NestedString(claim.Object, "spec", "storageClassName")
	var names []string
	for _, c := range classes.Items {
		if c.Name == want || want == "" && c.Annotations[defaultClass] == "true" {
			out.ok(check, "of class %s", c.Name)
			return
		}
		names = append(names, c.Name)
	}
	there := "there is none"
	if len(names) > 0 {
		there = "there are " + some(names)
	}
	if want == "" {
		out.fail(check, "choose one with ledger.storageClass ("+there+"), or make a claim and name it in ledger.existingClaim", "no StorageClass is the default")
		return
	}
	out.fail(check, "choose another with ledger.storageClass ("+there+")", "no StorageClass %s", want)
}

// claimName is the claim that the server's pod names.
func claimName(r *Rendered) string {
	if server := find(r, "Deployment", "castellan-server"); server != nil {
		volumes, _, _ := unstructured.NestedSlice(server.Object, "spec", "template", "spec", "volumes")
		for _, v := range volumes {
			if m, ok := v.(map[string]any); ok {
				if name, found, _ := unstructured.NestedString(m, "persistentVolumeClaim", "claimName"); found {
					return name
				}
			}
		}
	}
	return ""
}

// onLinux: only such a node is to have an agent.
func onLinux(node *corev1.Node) bool {
	return strings.EqualFold(node.Status.NodeInfo.OperatingSystem, "linux")
}
