package main

import (
	"bytes"
	"context"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestStdio(t *testing.T) {
	dir, err := os.MkdirTemp("", "st")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	socket := filepath.Join(dir, "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	got := make(chan string, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		data, _ := io.ReadAll(c) // until the end of standard input
		got <- string(data)
		_, _ = c.Write([]byte("answer"))
	}()
	var out bytes.Buffer
	if err := stdio(t.Context(), socket, strings.NewReader("question"), &out); err != nil {
		t.Fatal(err)
	}
	if q := <-got; q != "question" || out.String() != "answer" {
		t.Errorf("%q, %q", q, out.String())
	}
}

// TestStdioEnds with the process's context, though standard input never does.
func TestStdioEnds(t *testing.T) {
	dir, err := os.MkdirTemp("", "st")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	in, feed := io.Pipe()
	defer feed.Close()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := stdio(ctx, filepath.Join(dir, "s"), in, io.Discard); err != nil && ctx.Err() == nil {
		t.Error(err)
	}
}

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
