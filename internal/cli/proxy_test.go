package cli_test

import (
	"bytes"
	"context"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	castellanv1 "castellan.dev/api/castellan/v1"
	"castellan.dev/internal/cli"
)

// following is a workload whose proxy has acknowledged a version.
func following(namespace, pod, offered, has string) *castellanv1.WorkloadStatus {
	return &castellanv1.WorkloadStatus{
		PodUid: "uid-" + pod, PodName: pod, Namespace: namespace, ServiceAccount: "orders", Node: "node-1", Version: offered,
		Report: &castellanv1.WorkloadReport{
			PodUid: "uid-" + pod, Serial: "1f", NotAfter: timestamppb.New(time.Now().Add(30 * time.Minute)),
			Streams: []*castellanv1.StreamReport{{Client: "proxy", Resources: []*castellanv1.ResourceReport{
				{TypeUrl: castellanv1.TypeWorkloadPolicy, Name: "uid-" + pod, Acked: has},
			}}},
		},
	}
}

type proxyRow struct {
	Pod, Namespace, SPIFFEID, Serial, Offered, Acknowledged, State, Reason string
}

func TestProxyStatus(t *testing.T) {
	c := newCluster(t)
	all := &castellanv1.PoliciesResponse{Workloads: []*castellanv1.WorkloadStatus{
		following("shop", "orders-2", "v1", "v1"), following("shop", "orders-1", "v1", "v1"), following("blog", "web-1", "v1", "v1"),
		{PodUid: "outside", PodName: "outside", Namespace: "shop", ServiceAccount: "x"},
	}}
	p := c.server(all)
	r := c.run("proxy", "status").want(t, 0, "POD", "shop/orders-1", "node-1", "shop/orders", "1f", "29m", "SYNCED")
	if r.err != "" || strings.Contains(r.out, "outside") || strings.Index(r.out, "blog/web-1") > strings.Index(r.out, "shop/orders-1") || strings.Index(r.out, "orders-1") > strings.Index(r.out, "orders-2") {
		t.Errorf("%s%s", r.out, r.err)
	}
	var rows []proxyRow
	c.run("proxy", "status", "-n", "blog", "-o", "json").want(t, 0).decode(t, &rows)
	if want := (proxyRow{Pod: "web-1", Namespace: "blog", SPIFFEID: "spiffe://cluster.local/ns/blog/sa/orders", Serial: "1f", Offered: "v1", Acknowledged: "v1", State: "SYNCED"}); len(rows) != 1 || rows[0] != want {
		t.Errorf("%+v", rows)
	}
	for _, args := range [][]string{{"orders-1"}, {"pod/orders-1"}, {"shop/orders-1"}, {"orders-1", "-n", "shop"}} {
		c.run(append([]string{"proxy", "status", "-o", "json"}, args...)...).want(t, 0).decode(t, &rows)
		if len(rows) != 1 || rows[0].Pod != "orders-1" {
			t.Errorf("%q: %+v", args, rows)
		}
	}
	c.run("proxy", "status", "nosuch").want(t, 3, "the server knows no proxy of pod shop/nosuch")
	c.run("proxy", "status", "blog/web-1", "-n", "shop").want(t, 3, "is not in namespace")
	c.run("proxy", "status", "a/b/c").want(t, 3, `"a/b/c" names no pod`)
	c.run("proxy", "status", "--watch", "-o", "json").want(t, 3, "--watch prints lines")
	p.answer = &castellanv1.PoliciesResponse{}
	c.run("proxy", "status").want(t, 0, "there is no proxy")
	if r := c.run("proxy", "status", "-o", "json").want(t, 0); strings.TrimSpace(r.out) != "[]" {
		t.Errorf("%s", r.out)
	}
}

// One that does not follow is found, with why.
func TestProxyStates(t *testing.T) {
	resources := func(w *castellanv1.WorkloadStatus) []*castellanv1.ResourceReport {
		return w.GetReport().GetStreams()[0].GetResources()
	}
	for name, tt := range map[string]struct {
		change        func(w *castellanv1.WorkloadStatus)
		state, reason string
	}{
		"as it should be": {func(*castellanv1.WorkloadStatus) {}, "SYNCED", ""},
		"behind":          {func(w *castellanv1.WorkloadStatus) { w.Version = "v2" }, "STALE", "offered v2, has v1"},
		"one of two streams behind": {func(w *castellanv1.WorkloadStatus) {
			w.Report.Streams = append([]*castellanv1.StreamReport{{Resources: []*castellanv1.ResourceReport{{TypeUrl: castellanv1.TypeWorkloadPolicy, Acked: "v0"}}}}, w.Report.Streams...)
		}, "STALE", "offered v1, has v0"},
		"refuses": {func(w *castellanv1.WorkloadStatus) {
			resources(w)[0].Nacked, resources(w)[0].Reason = "v2", "no such field"
		}, "NACKED", "WorkloadPolicy v2: no such field"},
		"refuses something else": {func(w *castellanv1.WorkloadStatus) {
			w.Report.Streams[0].Resources = append(w.Report.Streams[0].Resources, &castellanv1.ResourceReport{TypeUrl: "type.googleapis.com/castellan.v1.ServiceIdentity", Name: "a/b", Nacked: "v9", Reason: "why"})
		}, "NACKED", "ServiceIdentity v9: why"},
		"denies everything": {func(w *castellanv1.WorkloadStatus) { w.DenyAll, w.DenyReason = true, "shop/x was refused" }, "DENIES", "shop/x was refused"},
		"expired":           {func(w *castellanv1.WorkloadStatus) { w.Report.NotAfter = timestamppb.New(time.Now().Add(-time.Hour)) }, "EXPIRED", "1h0m0s ago"},
		"not reported":      {func(w *castellanv1.WorkloadStatus) { w.Report = nil }, "AWAY", "does the agent on node-1 run?"},
		"not connected":     {func(w *castellanv1.WorkloadStatus) { w.Report.Streams = nil }, "AWAY", "no proxy is connected to its agent"},
		"no certificate":    {func(w *castellanv1.WorkloadStatus) { w.Report.Serial, w.Report.NotAfter = "", nil }, "UNCERTIFIED", "its agent has no certificate"},
	} {
		t.Run(name, func(t *testing.T) {
			c := newCluster(t)
			w := following("shop", "orders-1", "v1", "v1")
			tt.change(w)
			c.server(&castellanv1.PoliciesResponse{Workloads: []*castellanv1.WorkloadStatus{following("shop", "fine", "v1", "v1"), w}})
			code := 2
			if tt.state == "SYNCED" {
				code = 0
			}
			c.run("proxy", "status").want(t, code, tt.state, tt.reason)
			var rows []proxyRow
			c.run("proxy", "status", "-o", "json").want(t, code).decode(t, &rows)
			if len(rows) != 2 || rows[1].State != tt.state || !strings.Contains(rows[1].Reason, tt.reason) || rows[0].State != "SYNCED" {
				t.Errorf("%+v", rows)
			}
		})
	}
}

// lockedOutput may be read while it is written.
type lockedOutput struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedOutput) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *lockedOutput) await(t *testing.T, text string) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for {
		l.mu.Lock()
		got := l.b.String()
		l.mu.Unlock()
		if strings.Contains(got, text) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("no %q in\n%s", text, got)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func TestProxyWatch(t *testing.T) {
	c := newCluster(t)
	p := c.server(&castellanv1.PoliciesResponse{Workloads: []*castellanv1.WorkloadStatus{following("shop", "orders-1", "v1", "v1")}})
	t.Setenv("KUBECONFIG", c.kubeconfig)
	t.Chdir(t.TempDir())
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	out, errw := &lockedOutput{}, &lockedOutput{}
	ended := make(chan int)
	go func() {
		ended <- cli.Run(ctx, []string{"castellan", "proxy", "status", "--watch"}, strings.NewReader(""), out, errw)
	}()
	out.await(t, "SYNCED")
	p.set(&castellanv1.PoliciesResponse{Workloads: []*castellanv1.WorkloadStatus{following("shop", "orders-1", "v2", "v1")}})
	out.await(t, "STALE")
	p.set(&castellanv1.PoliciesResponse{})
	out.await(t, "GONE")
	// The server's pod is replaced.
	c.stop("castellan-server-0")
	errw.await(t, "trying again")
	c.server(&castellanv1.PoliciesResponse{Workloads: []*castellanv1.WorkloadStatus{following("shop", "orders-9", "v3", "v3")}})
	out.await(t, "orders-9")
	cancel()
	if code := <-ended; code != 0 {
		t.Errorf("exit code %d", code)
	}
}
