package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// benchAuthorize runs the engine's own benchmarks and casbin's in one run.
func benchAuthorize(ctx context.Context, _ options) error {
	cmd := exec.CommandContext(ctx, "go", "test", "-run", "^$", "-bench", "Authorize|Enforce", "-benchmem", "-benchtime", "300ms", "./authz/...")
	cmd.Dir = "../.."
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%w\n%s", err, out)
	}
	line := regexp.MustCompile(`(?m)^(Benchmark\S+)\s+\d+\s+([\d.]+) ns/op.*?(\d+) allocs/op`)
	worst, allocs := 0.0, 0
	for _, m := range line.FindAllStringSubmatch(string(out), -1) {
		ns, _ := strconv.ParseFloat(m[2], 64)
		n, _ := strconv.Atoi(m[3])
		fmt.Printf("  %-70s %12.0f ns %4d allocs\n", m[1], ns, n)
		if strings.Contains(m[1], "Authorize") && regexp.MustCompile(`(^|\D)10?000(\D|$)`).MatchString(m[1]) {
			worst, allocs = max(worst, ns/1000), max(allocs, n)
		}
	}
	if worst == 0 {
		return errors.New("no benchmark of 1,000 or 10,000 rules was found")
	}
	reach("Authorize at 1,000 and 10,000 rules, slowest shape", worst, 1, " µs")
	reach("allocations", float64(allocs), 0, "")
	return nil
}

// benchMemory: resident memory of one proxy, idle and with 1,000 idle mutual TLS connections.
func benchMemory(ctx context.Context, opt options) error {
	if err := raiseFiles(); err != nil {
		return err
	}
	m, err := startMesh(ctx, opt, benchPolicies())
	if err != nil {
		return err
	}
	defer m.stop()
	dir, err := os.MkdirTemp("", "cb")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	mat, err := fetchMaterial(ctx, m.Workloads["shop/frontend"].Socket, dir)
	if err != nil {
		return err
	}
	orders := m.Workloads["shop/orders"]
	time.Sleep(3 * time.Second)
	idle, err := rss(orders.PID)
	if err != nil {
		return err
	}
	reach("resident memory, idle", idle, 20, " MB")
	const conns = 1000
	l := load{addr: orders.Inbound, tls: clientTLS(mat.cert, mat.pool)}
	var open []net.Conn
	defer func() {
		for _, c := range open {
			c.Close()
		}
	}()
	request := []byte("GET /r19/x HTTP/1.1\r\nHost: orders.shop\r\n\r\n")
	for range conns {
		c, err := l.dial(ctx)
		if err != nil {
			return err
		}
		open = append(open, c)
		if _, err := c.Write(request); err != nil { // each has done one request
			return err
		}
		buf := make([]byte, 2048)
		for n := 0; n < 1024; {
			k, err := c.Read(buf)
			if err != nil {
				return err
			}
			n += k
		}
	}
	time.Sleep(5 * time.Second)
	held, err := rss(orders.PID)
	if err != nil {
		return err
	}
	reach(fmt.Sprintf("resident memory, %d idle mTLS connections", conns), held, 90, " MB")
	return nil
}

// arrivals notes when each serial number first reached one stream.
type arrivals struct {
	mu   sync.Mutex
	seen map[string][]time.Time
}

func (a *arrivals) OnX509ContextUpdate(c *workloadapi.X509Context) {
	now := time.Now()
	a.mu.Lock()
	defer a.mu.Unlock()
	serial := fmt.Sprintf("%x", c.DefaultSVID().Certificates[0].SerialNumber)
	a.seen[serial] = append(a.seen[serial], now)
}

func (a *arrivals) OnX509ContextWatchError(error) {}

// benchRotation: 10-second leaves under load. How long after the ledger's intent,
// which precedes the signature, the certificate is on the last of the open streams;
// and how many requests failed.
func benchRotation(ctx context.Context, opt options) error {
	m, err := startMesh(ctx, opt, benchPolicies(), "--svid-ttl", "10s")
	if err != nil {
		return err
	}
	defer m.stop()
	const streams, length = 50, 40 * time.Second
	watch, cancel := context.WithTimeout(ctx, length)
	defer cancel()
	a := &arrivals{seen: map[string][]time.Time{}}
	var wg sync.WaitGroup
	socket := m.Workloads["shop/orders"].Socket
	for range streams {
		wg.Go(func() { _ = workloadapi.WatchX509Context(watch, a, workloadapi.WithAddr("unix://"+socket)) })
	}
	// Through both proxies: the client's and the server's certificate rotate.
	out := load{addr: strings.TrimPrefix(m.Workloads["shop/frontend"].Outbound["orders"], "http://"), path: "/r19/x", conns: 8, perSecond: 400}.run(ctx, length)
	wg.Wait()
	issued, err := ledger(ctx, opt, m)
	if err != nil {
		return err
	}
	var worst []float64
	for serial, times := range a.seen {
		if created, ok := issued[serial]; ok && len(times) == streams {
			worst = append(worst, slices.MaxFunc(times, time.Time.Compare).Sub(created).Seconds()*1000)
		}
	}
	// The first certificate was there before the streams were.
	slices.Sort(worst)
	if len(worst) > 1 {
		worst = worst[:len(worst)-1]
	}
	fmt.Printf("  %d rotations, %d requests at 400/s, %d failed (%v)\n", len(worst), out.requests, out.failed, out.firstErr)
	reach(fmt.Sprintf("intent to the last of %d streams, median", streams), median(worst), 50, " ms")
	reach(fmt.Sprintf("intent to the last of %d streams, worst", streams), slices.Max(worst), 50, " ms")
	reach("failed requests", float64(out.failed), 0, "")
	return nil
}

func ledger(ctx context.Context, opt options, m *mesh) (map[string]time.Time, error) {
	out, err := exec.CommandContext(ctx, filepath.Join(opt.bin, "castellan"), "ca", "issued", "--up", filepath.Join(m.dir, "up.json"), "-o", "json").Output()
	if err != nil {
		return nil, err
	}
	var rows []struct {
		Serial    string    `json:"serial"`
		CreatedAt time.Time `json:"createdAt"`
	}
	if err := json.Unmarshal(out, &rows); err != nil {
		return nil, err
	}
	issued := map[string]time.Time{}
	for _, r := range rows {
		issued[r.Serial] = r.CreatedAt
	}
	return issued, nil
}

// benchPolicy: a policy file changed → enforced, and reported as enforced.
func benchPolicy(ctx context.Context, opt options) error {
	m, err := startMesh(ctx, opt, nil)
	if err != nil {
		return err
	}
	defer m.stop()
	path := filepath.Join(m.PolicyDir, "90-bench.yaml")
	deny := []byte(`apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: bench, namespace: shop}
spec:
  action: DENY
  rules: [{to: [{operation: {paths: ["/bench"]}}]}]
`)
	url := m.Workloads["shop/frontend"].Outbound["orders"] + "/bench"
	var enforced, reported []float64
	for range opt.repeat {
		began := time.Now()
		if err := os.WriteFile(path, deny, 0o644); err != nil {
			return err
		}
		if err := waitListen(ctx, func() error {
			if getOK(url) == nil {
				return errors.New("still allowed")
			}
			return nil
		}); err != nil {
			return err
		}
		enforced = append(enforced, time.Since(began).Seconds()*1000)
		if err := waitListen(ctx, func() error {
			out, _ := exec.CommandContext(ctx, filepath.Join(opt.bin, "castellan"), "check", "--up", filepath.Join(m.dir, "up.json")).Output()
			if !bytes.Contains(out, []byte("shop/bench: in force on 3 of 3")) {
				return fmt.Errorf("not reported: %s", out)
			}
			return nil
		}); err != nil {
			return err
		}
		reported = append(reported, time.Since(began).Seconds()*1000)
		if err := os.Remove(path); err != nil {
			return err
		}
		if err := waitListen(ctx, func() error { return getOK(url) }); err != nil {
			return err
		}
	}
	reach("policy file changed → enforced, worst", slices.Max(enforced), 1000, " ms")
	reach("policy file changed → reported as enforced, worst", slices.Max(reported), 1000, " ms")
	return nil
}
