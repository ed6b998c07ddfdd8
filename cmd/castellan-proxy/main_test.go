package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// TestMain is also castellan-proxy, in processes that tests start.
func TestMain(m *testing.M) {
	if os.Getenv("CASTELLAN_PROXY_CHILD") != "" {
		main()
		return
	}
	goleak.VerifyTestMain(m)
}

func write(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "proxy.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestBadStarts(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	const head = "apiVersion: castellan.dev/v1alpha1\nkind: ProxyConfig\nagentSocket: /nowhere/s\n"
	inbound := fmt.Sprintf("inbound: [{listen: %q, app: \"127.0.0.1:1\"}]\n", "127.0.0.1:0")
	for name, tt := range map[string]struct {
		args []string
		want string
	}{
		"no file":         {nil, "-config FILE or -config-env NAME is required"},
		"two sources":     {[]string{"-config", "x", "-config-env", "Y"}, "give one of them"},
		"argument":        {[]string{"-config", "x", "y"}, `unexpected argument "y"`},
		"no variable":     {[]string{"-config-env", "CASTELLAN_NOT_SET"}, "environment variable CASTELLAN_NOT_SET is not set"},
		"absent file":     {[]string{"-config", "/nowhere/p.yaml"}, "no such file"},
		"unknown field":   {[]string{"-config", write(t, head+inbound+"polcy: x\n")}, `unknown field "polcy"`},
		"no listener":     {[]string{"-config", write(t, head)}, "at least one listener is needed"},
		"wrong kind":      {[]string{"-config", write(t, strings.Replace(head, "ProxyConfig", "AgentConfig", 1)+inbound)}, `kind: "AgentConfig", want "ProxyConfig"`},
		"port taken":      {[]string{"-config", write(t, head+"admin: 127.0.0.1:0\n"+strings.Replace(inbound, "127.0.0.1:0", taken.Addr().String(), 1))}, "address already in use"},
		"admin taken":     {[]string{"-config", write(t, head+"admin: \""+taken.Addr().String()+"\"\n"+inbound)}, "admin listener: listen tcp"},
		"log not to open": {[]string{"-config", write(t, head+"accessLog: /nowhere/access.log\n"+inbound)}, "access log: open /nowhere/access.log"},
	} {
		t.Run(name, func(t *testing.T) {
			err := serve(context.Background(), tt.args, io.Discard, io.Discard)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("err %v, want %q", err, tt.want)
			}
		})
	}
	if err := serve(context.Background(), []string{"-h"}, io.Discard, io.Discard); !errors.Is(err, flag.ErrHelp) {
		t.Fatalf("err %v", err)
	}
}

type lines struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// Without an agent the proxy lives, is not ready, and says why; a signal ends it.
func TestServesAndStops(t *testing.T) {
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	admin := free.Addr().String()
	free.Close()
	path := write(t, "apiVersion: castellan.dev/v1alpha1\nkind: ProxyConfig\nagentSocket: /nowhere/s\nadmin: "+admin+
		"\naccessLog: \"off\"\ninbound: [{listen: \"127.0.0.1:0\", app: \"127.0.0.1:1\"}]\n")
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var stderr lines
	done := make(chan error, 1)
	go func() { done <- serve(ctx, []string{"-config", path}, io.Discard, &stderr) }()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 5 * time.Second}
	ask := func(path string) (int, string) {
		resp, err := client.Get("http://" + admin + path)
		if err != nil {
			return 0, ""
		}
		defer resp.Body.Close()
		body, _ := io.ReadAll(resp.Body)
		return resp.StatusCode, string(body)
	}
	deadline := time.Now().Add(10 * time.Second)
	for {
		if status, _ := ask("/livez"); status == 200 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("not alive: %s", &stderr)
		}
		time.Sleep(5 * time.Millisecond)
	}
	status, body := ask("/readyz?verbose")
	if status != 503 || !strings.Contains(body, "[-] identity: no certificate from the agent yet") || !strings.Contains(body, "[-] policy: ") {
		t.Fatalf("%d %s", status, body)
	}
	if _, body := ask("/metrics"); !strings.Contains(body, "castellan_proxy_policy_received 0") {
		t.Fatal("metrics are missing")
	}
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(stderr.String(), `"msg":"stopped"`) {
		t.Fatalf("%s", &stderr)
	}
}
