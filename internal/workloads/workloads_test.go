package workloads_test

import (
	"bytes"
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"castellan.dev/internal/workloads"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const good = `apiVersion: castellan.dev/v1alpha1
kind: Workloads
workloads:
- {namespace: shop, serviceAccount: orders, podUID: "u1", podName: orders, serviceAccountUID: "s1", node: local, labels: {app: orders}, address: 127.0.0.1, ports: [{number: 8080, protocol: http}]}
- {namespace: shop, serviceAccount: frontend, podUID: "u2", node: local}
services:
- {namespace: shop, name: orders, hosts: [orders, orders.shop.svc.cluster.local], addresses: [10.0.0.1], ports: [{name: http, number: 80, protocol: http}], endpoints: [{workload: u1, ports: {80: 41234}}], subjectAltNames: ["spiffe://cluster.local/ns/shop/sa/orders"]}
`

func TestParse(t *testing.T) {
	f, err := workloads.Parse([]byte(good))
	if err != nil {
		t.Fatal(err)
	}
	w, s := f.Workloads[0], f.Services[0]
	if len(f.Workloads) != 2 || w.Account().String() != "shop/orders" || w.Labels["app"] != "orders" || w.Ports[0].Number != 8080 {
		t.Errorf("%+v", f.Workloads)
	}
	if s.Endpoints[0].Ports[80] != 41234 || s.Ports[0].Protocol != "http" {
		t.Errorf("%+v", s)
	}
	swap := func(old, new string) string { return strings.Replace(good, old, new, 1) }
	tests := map[string]struct{ text, want string }{
		"empty":                  {"", `apiVersion: "", want "castellan.dev/v1alpha1"`},
		"half-written":           {good[:len(good)/2], "workloads:"},
		"not YAML":               {"{", "workloads:"},
		"wrong version":          {swap("v1alpha1", "v2"), `apiVersion: "castellan.dev/v2"`},
		"wrong kind":             {swap("kind: Workloads", "kind: Pods"), `kind: "Pods", want "Workloads"`},
		"unknown field":          {swap("podName:", "podname:"), `unknown field "workloads[0].podname"`},
		"duplicate field":        {swap("podName: orders", "podUID: u9"), "already set in map"},
		"wrong type":             {swap("labels: {app: orders}", "labels: [app]"), "labels"},
		"no namespace":           {swap("namespace: shop", `namespace: ""`), `workloads[0].namespace/serviceAccount: identity: "" is not a namespace`},
		"bad account":            {swap("serviceAccount: frontend", "serviceAccount: Front_End"), "workloads[1].namespace/serviceAccount"},
		"no UID":                 {swap(`podUID: "u1"`, `podUID: ""`), "workloads[0].podUID: required"},
		"UID twice":              {swap(`"u2"`, `"u1"`), `workloads[1].podUID: "u1" is used twice`},
		"UID with a space":       {swap(`"u2"`, `"u 2"`), `workloads[1].podUID: "u 2" has a character`},
		"UID too long":           {swap(`"u2"`, `"`+strings.Repeat("u", 300)+`"`), "workloads[1].podUID: has 300 bytes"},
		"no node":                {swap(`"u2", node: local`, `"u2"`), "workloads[1].node: required"},
		"label without key":      {swap("{app: orders}", `{"": orders}`), "workloads[0].labels"},
		"port zero":              {swap("number: 8080", "number: 0"), "workloads[0].ports[0].number"},
		"port too large":         {swap("number: 8080", "number: 70000"), "number"},
		"unknown protocol":       {swap("number: 8080, protocol: http", "number: 8080, protocol: udp"), `workloads[0].ports[0].protocol: "udp", want one of`},
		"service without ports":  {swap("ports: [{name: http, number: 80, protocol: http}]", "ports: []"), "services[0].ports: at least one"},
		"service of a bad name":  {swap("name: orders, hosts", "name: Orders, hosts"), "services[0].namespace/name"},
		"bad address":            {swap("10.0.0.1", "10.0.0.300"), `services[0].addresses[0]: "10.0.0.300"`},
		"unknown endpoint":       {swap("workload: u1", "workload: u7"), `services[0].endpoints[0].workload: "u7" is no podUID`},
		"endpoint of no port":    {swap("{80: 41234}", "{81: 41234}"), "services[0].endpoints[0].ports: 81 is no port of the service"},
		"endpoint at port 0":     {swap("{80: 41234}", "{80: 0}"), "services[0].endpoints[0].ports: 80"},
		"bad SPIFFE ID":          {swap("spiffe://cluster.local", "https://cluster.local"), "services[0].subjectAltNames[0]"},
		"second document":        {good + "---\n" + good, "more than one YAML document"},
		"larger than is allowed": {good + strings.Repeat("#", 17<<20), "16777216 are allowed"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			if _, err := workloads.Parse([]byte(tt.text)); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("error %v, want %q", err, tt.want)
			}
		})
	}
}

// lockedBuffer is a log that a test reads while it is written.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

func TestWatcher(t *testing.T) {
	path := filepath.Join(t.TempDir(), "workloads.yaml")
	if _, err := workloads.NewWatcher(path, nil); err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Fatalf("missing: %v", err)
	}
	replace := func(text string) {
		t.Helper()
		if err := os.WriteFile(path+".new", []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(path+".new", path); err != nil {
			t.Fatal(err)
		}
	}
	replace("kind: x")
	if _, err := workloads.NewWatcher(path, nil); err == nil || !strings.Contains(err.Error(), "workloads.yaml") {
		t.Fatalf("broken: %v", err)
	}
	replace(good)
	log := &lockedBuffer{}
	w, err := workloads.NewWatcher(path, slog.New(slog.NewTextHandler(log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); _ = w.Run(ctx) }()
	defer func() { cancel(); <-done }()
	await := func(what string, cond func() bool) {
		t.Helper()
		deadline := time.Now().Add(20 * time.Second)
		for !cond() {
			if time.Now().After(deadline) {
				t.Fatalf("%s: it did not happen", what)
			}
			select {
			case <-w.Changed():
			case <-time.After(10 * time.Millisecond):
			}
		}
	}
	entries := func(n int) func() bool {
		return func() bool { return len(w.Current().Workloads) == n && w.Err() == nil }
	}
	await("first", entries(2))
	one := strings.Replace(good, "- {namespace: shop, serviceAccount: frontend, podUID: \"u2\", node: local}\n", "", 1)
	replace(one)
	await("an entry removed", entries(1))
	replace(good[:len(good)/2])
	await("half-written", func() bool { return w.Err() != nil && len(w.Current().Workloads) == 1 })
	if !strings.Contains(log.String(), "its last good version stays in force") {
		t.Errorf("log: %s", log.String())
	}
	replace(good)
	await("whole again", entries(2))
	// Written in place, as an editor may.
	if err := os.WriteFile(path, []byte(one), 0o600); err != nil {
		t.Fatal(err)
	}
	await("written in place", entries(1))
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	await("removed", func() bool { return w.Err() != nil && len(w.Current().Workloads) == 1 })
	replace(good)
	await("back", entries(2))
}
