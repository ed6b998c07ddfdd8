package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestStartRefuses(t *testing.T) {
	dir := t.TempDir()
	file := func(text string) string {
		path := filepath.Join(t.TempDir(), "agent.yaml")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	const head = "apiVersion: castellan.dev/v1alpha1\nkind: AgentConfig\ntrustDomain: cluster.local\nnode: local\ntokenFile: /t\n"
	const server = "server: {address: \"127.0.0.1:1\", bundleFile: /b}\n"
	for _, test := range []struct {
		name string
		args []string
		want string
	}{
		{"nothing", nil, "usage: castellan-agent -config FILE"},
		{"more than it takes", []string{"-config", "x", "y"}, "usage: castellan-agent -config FILE"},
		{"a missing file", []string{"-config", filepath.Join(dir, "missing")}, "no such file or directory"},
		{"an unknown field", []string{"-config", file(head + server + "sockets: []\n")}, `unknown field "sockets"`},
		{"no server", []string{"-config", file(head)}, "server.address: required"},
		{"an address for a trust domain", []string{"-config", file(strings.Replace(head, "cluster.local", "10.0.0.1", 1) + server)}, `trustDomain: identity: trust domain "10.0.0.1" looks like an IP address`},
		{"nobody admitted", []string{"-config", file(head + server + "workloads: [{namespace: a, serviceAccount: b, socket: /s, tokenFile: /t}]\n")}, "workloads[0].uids: an empty list admits nobody"},
		{"too long a socket path", []string{"-config", file(head + server + "workloads: [{namespace: a, serviceAccount: b, uids: [0], tokenFile: /t, socket: /" + strings.Repeat("x", 110) + "}]\n")}, "has 111 bytes and the kernel takes 107; choose a shorter directory"},
	} {
		t.Run(test.name, func(t *testing.T) {
			err := start(context.Background(), test.args, &bytes.Buffer{})
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, want %s", err, test.want)
			}
		})
	}
}
