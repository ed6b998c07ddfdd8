package main

import (
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestStdioRefuses(t *testing.T) {
	file := filepath.Join(t.TempDir(), "agent.yaml")
	if err := os.WriteFile(file, []byte("apiVersion: castellan.dev/v1alpha1\nkind: AgentConfig\ntrustDomain: cluster.local\nnode: local\ntokenFile: /t\nserver: {address: \"127.0.0.1:1\", bundleFile: /b}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		args []string
		want string
	}{
		{[]string{"admin-stdio"}, "usage: castellan-agent admin-stdio -config FILE"},
		{[]string{"admin-stdio", "-config", file}, "the configuration has no adminSocket"},
	} {
		if err := dispatch(t.Context(), test.args, io.Discard); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%v: %v", test.args, err)
		}
	}
}
