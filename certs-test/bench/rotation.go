package main

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"castellan.dev/sds"
)

// arrivals notes when each serial number reached streams of one kind.
type arrivals struct {
	mu   sync.Mutex
	seen map[string][]time.Time
}

func (a *arrivals) add(cert *x509.Certificate) {
	now := time.Now()
	a.mu.Lock()
	defer a.mu.Unlock()
	serial := fmt.Sprintf("%x", cert.SerialNumber)
	a.seen[serial] = append(a.seen[serial], now)
}

func (a *arrivals) OnX509ContextUpdate(c *workloadapi.X509Context) {
	a.add(c.DefaultSVID().Certificates[0])
}

func (a *arrivals) OnX509ContextWatchError(error) {}

// watchSDS follows a workload's certificate by delta SDS, acknowledging as Envoy does.
func (a *arrivals) watchSDS(ctx context.Context, socket string) error {
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	stream, err := secretv3.NewSecretDiscoveryServiceClient(conn).DeltaSecrets(ctx)
	if err != nil {
		return err
	}
	ask := &discoveryv3.DeltaDiscoveryRequest{TypeUrl: sds.TypeSecret, ResourceNamesSubscribe: []string{"default"}}
	for {
		if err := stream.Send(ask); err != nil {
			return err
		}
		resp, err := stream.Recv()
		if err != nil {
			return err
		}
		for _, r := range resp.Resources {
			var secret tlsv3.Secret
			if err := r.Resource.UnmarshalTo(&secret); err != nil {
				return err
			}
			block, _ := pem.Decode(secret.GetTlsCertificate().GetCertificateChain().GetInlineBytes())
			if block == nil {
				return errors.New("a secret without a chain")
			}
			leaf, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				return err
			}
			a.add(leaf)
		}
		ask = &discoveryv3.DeltaDiscoveryRequest{TypeUrl: sds.TypeSecret, ResponseNonce: resp.Nonce}
	}
}

// worst returns, for each rotation between two instants, the milliseconds from the
// ledger's intent to the last of the streams. One that missed a stream is an error.
func (a *arrivals) worst(issued map[string]time.Time, streams int, from, to time.Time) ([]float64, error) {
	var out []float64
	for serial, times := range a.seen {
		created, ok := issued[serial]
		if !ok || created.Before(from) || created.After(to) {
			continue
		}
		if len(times) != streams {
			return nil, fmt.Errorf("certificate %s reached %d of %d streams", serial, len(times), streams)
		}
		out = append(out, slices.MaxFunc(times, time.Time.Compare).Sub(created).Seconds()*1000)
	}
	if len(out) == 0 {
		return nil, errors.New("nothing rotated")
	}
	return out, nil
}

// benchRotation: how long after the ledger's intent, which precedes the signature,
// a certificate is on the last of the open streams; how many requests fail while
// certificates rotate; and what that does to the slowest requests.
func benchRotation(ctx context.Context, opt options) error {
	if err := rotationStreams(ctx, opt); err != nil {
		return err
	}
	opt.printf("\n  latency at %d/s through both proxies, keep-alive:\n", rotationRate)
	for _, ttl := range []string{"1h", "5s"} {
		out, err := rotationLoad(ctx, opt, ttl)
		if err != nil {
			return err
		}
		opt.printf("  leaves of %-4s %s, %d requests, %d failed (%v)\n", ttl+":", quantiles(out.latency), out.requests, out.failed, out.firstErr)
	}
	return nil
}

const rotationRate = 1000

// through is load through two proxies: the client's and the server's certificate rotate.
func through(m *mesh, rate float64) load {
	return load{addr: strings.TrimPrefix(m.Workloads["shop/frontend"].Outbound["orders"], "http://"), size: 1024, conns: 8, perSecond: rate}
}

// rotationLoad is a run long enough for certificates of 5 s to rotate eight times.
func rotationLoad(ctx context.Context, opt options, ttl string) (outcome, error) {
	m, err := startMesh(ctx, opt, benchPolicies(), "--svid-ttl", ttl)
	if err != nil {
		return outcome{}, err
	}
	defer m.stop()
	if err := errors.Join(pin(m.Workloads["shop/orders"].PID, testCPU), pin(os.Getpid(), loadCPU)); err != nil {
		return outcome{}, err
	}
	return through(m, rotationRate).run(ctx, 20*time.Second), ctx.Err()
}

func rotationStreams(ctx context.Context, opt options) error {
	m, err := startMesh(ctx, opt, benchPolicies(), "--svid-ttl", "10s")
	if err != nil {
		return err
	}
	defer m.stop()
	const streams, length, settle = 50, 40 * time.Second, 2 * time.Second
	watch, cancel := context.WithTimeout(ctx, length)
	defer cancel()
	workload, secrets := &arrivals{seen: map[string][]time.Time{}}, &arrivals{seen: map[string][]time.Time{}}
	socket := m.Workloads["shop/orders"].Socket
	broken := make([]error, streams)
	began := time.Now()
	var wg sync.WaitGroup
	for i := range streams {
		wg.Go(func() { _ = workloadapi.WatchX509Context(watch, workload, workloadapi.WithAddr("unix://"+socket)) })
		wg.Go(func() {
			if err := secrets.watchSDS(watch, socket); watch.Err() == nil {
				broken[i] = err
			}
		})
	}
	out := through(m, 400).run(ctx, length)
	wg.Wait()
	issued, err := ledger(ctx, opt, m)
	if err := errors.Join(append(broken, err, ctx.Err())...); err != nil {
		return err
	}
	opt.printf("  leaves of 10 s, %d requests at 400/s through both proxies, %d failed (%v)\n", out.requests, out.failed, out.firstErr)
	opt.reach("failed requests", float64(out.failed), 0, "")
	for _, kind := range []struct {
		name string
		*arrivals
	}{{"Workload API", workload}, {"delta SDS", secrets}} {
		worst, err := kind.worst(issued, streams, began.Add(settle), began.Add(length-settle))
		if err != nil {
			return fmt.Errorf("%s: %w", kind.name, err)
		}
		what := fmt.Sprintf("intent to the last of %d %s streams", streams, kind.name)
		opt.reach(what+", median", median(worst), 50, " ms")
		opt.reach(fmt.Sprintf("%s, worst of %d", what, len(worst)), slices.Max(worst), 50, " ms")
	}
	return nil
}

// ledger returns when each certificate was intended, by serial number.
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
