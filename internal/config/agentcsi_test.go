package config_test

import (
	"strings"
	"testing"

	"castellan.dev/internal/config"
)

func TestAgentCSI(t *testing.T) {
	long := "/" + strings.Repeat("a", 63)
	runRows(t, goodAgent, map[string]row{
		"good":                   {`{csi: {}}`, ""},
		"a relative directory":   {`{csi: {kubeletDir: kubelet}}`, `csi.kubeletDir: "kubelet" must be an absolute path in its shortest form`},
		"a slash at the end":     {`{csi: {kubeletDir: /var/lib/kubelet/}}`, `csi.kubeletDir: "/var/lib/kubelet/" must be an absolute path in its shortest form`},
		"a directory too deep":   {`{csi: {kubeletDir: ` + long + `}}`, `csi.kubeletDir: "` + long + `/plugins_registry/csi.castellan.dev-reg.sock" has 108 bytes and the kernel takes 107; choose a shorter directory`},
		"dots in the state":      {`{csi: {stateDir: /run/../x}}`, `csi.stateDir: "/run/../x" must be an absolute path in its shortest form`},
		"a long admin socket":    {`{adminSocket: /` + strings.Repeat("a", 107) + `}`, `adminSocket: "/` + strings.Repeat("a", 107) + `" has 108 bytes and the kernel takes 107; choose a shorter directory`},
		"an unknown field of it": {`{csi: {socket: x}}`, `unknown field "csi.socket"`},
	}, func() interface{ Validate() error } { return &config.Agent{} })

	t.Setenv("NODE_NAME", "node-7")
	var a config.Agent
	if err := load(t, strings.Replace(goodAgent, "node: local\n", "csi: {}\n", 1), &a); err != nil {
		t.Fatal(err)
	}
	want := config.AgentCSI{KubeletDir: "/var/lib/kubelet", StateDir: "/run/castellan/agent", Audience: "castellan.dev"}
	if a.Node != "node-7" || *a.CSI != want || a.AdminSocket != "/run/castellan/admin.sock" {
		t.Errorf("%+v, %+v", a, a.CSI)
	}
	var b config.Agent
	if err := load(t, goodAgent, &b); err != nil || b.Node != "local" || b.CSI != nil || b.AdminSocket != "" {
		t.Errorf("%+v %v", b, err)
	}
}
