package main

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/big"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	securityv1alpha1 "istio.io/api/security/v1alpha1"
)

// benchIssue: one SVID through the gRPC service, a new RS256 workload token each
// time, agent token and connection kept, ledger on; CPU of the server's process
// against parsing and verifying the CSR and x509.CreateCertificate alone.
func benchIssue(ctx context.Context, opt options) error {
	m, err := startMesh(ctx, opt, nil)
	if err != nil {
		return err
	}
	defer m.stop()
	l, err := newIssueLoad(m)
	if err != nil {
		return err
	}
	defer l.conn.Close()
	if err := pin(m.Server.PID, testCPU); err != nil {
		return err
	}
	if err := pin(os.Getpid(), loadCPU); err != nil {
		return err
	}
	const perCell = 3000
	if err := l.run(ctx, 500); err != nil { // warm up
		return err
	}
	var latency []time.Duration
	var alone, beside, served, ratioAlone, ratioBeside []float64
	for i := range opt.repeat {
		quiet, err := floorCPU(perCell)
		if err != nil {
			return err
		}
		// The server is measured while the loader works on the other CPU, which on
		// many machines is the other half of the same core. So the floor is
		// measured in both ways: with that CPU idle, and with the loader at work.
		prepared := make(chan error, 1)
		var jobs []issueJob
		go func() {
			var err error
			jobs, err = l.prepare(perCell)
			prepared <- err
		}()
		busy, err := floorCPU(perCell / 2)
		if err := errors.Join(err, <-prepared); err != nil {
			return err
		}
		before, err := cpuTime(m.Server.PID)
		if err != nil {
			return err
		}
		began := time.Now()
		took, err := l.ask(ctx, jobs)
		if err != nil {
			return err
		}
		wall := time.Since(began)
		after, err := cpuTime(m.Server.PID)
		if err != nil {
			return err
		}
		cost := float64((after - before).Microseconds()) / perCell
		alone, beside, served = append(alone, quiet), append(beside, busy), append(served, cost)
		ratioAlone, ratioBeside = append(ratioAlone, cost/quiet), append(ratioBeside, cost/busy)
		latency = append(latency, took...)
		opt.printf("  run %d: floor %.0f µs (%.0f µs beside a busy loader), served %.0f µs at %.0f/s\n", i+1, quiet, busy, cost, perCell/wall.Seconds())
	}
	opt.printf("  median: floor %.0f µs (%.0f µs beside a busy loader), served %.0f µs\n", median(alone), median(beside), median(served))
	opt.printf("  latency with %d callers in a closed loop: %s\n", issueCallers, quantiles(latency))
	opt.reach("server CPU per SVID against the floor, other CPU idle", median(ratioAlone), 1.6, "×")
	opt.reach("server CPU per SVID against the floor beside a busy loader", median(ratioBeside), 1.6, "×")
	return nil
}

// floorCPU runs the floor in a process of its own, on the tested CPU.
func floorCPU(n int) (float64, error) {
	self, err := os.Executable()
	if err != nil {
		return 0, err
	}
	cmd := exec.Command("taskset", "-c", fmt.Sprint(testCPU), self, "floor", "-n", fmt.Sprint(n))
	cmd.Env = append(os.Environ(), "GOMAXPROCS=1")
	out, err := cmd.Output()
	if err != nil {
		return 0, err
	}
	var us float64
	_, err = fmt.Sscan(string(out), &us)
	return us, err
}

func runFloor(args []string) error {
	fs := flag.NewFlagSet("floor", flag.ContinueOnError)
	n := fs.Int("n", 1000, "certificates")
	if err := fs.Parse(args); err != nil {
		return err
	}
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	ca := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "floor"}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, SubjectKeyId: []byte{1, 2, 3, 4}}
	csr, _, err := newCSR()
	if err != nil {
		return err
	}
	id, _ := url.Parse("spiffe://cluster.local/ns/shop/sa/frontend")
	before := selfCPU()
	for range *n {
		block, _ := pem.Decode(csr)
		req, err := x509.ParseCertificateRequest(block.Bytes)
		if err != nil {
			return err
		}
		if err := req.CheckSignature(); err != nil {
			return err
		}
		serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
		if err != nil {
			return err
		}
		now := time.Now()
		template := &x509.Certificate{SerialNumber: serial, URIs: []*url.URL{id}, NotBefore: now, NotAfter: now.Add(time.Hour),
			KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}, BasicConstraintsValid: true}
		if _, err := x509.CreateCertificate(rand.Reader, template, ca, req.PublicKey, caKey); err != nil {
			return err
		}
	}
	fmt.Println(float64((selfCPU() - before).Microseconds()) / float64(*n))
	return nil
}

func selfCPU() time.Duration {
	var u unix.Rusage
	_ = unix.Getrusage(unix.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func newCSR() (pemCSR []byte, key crypto.Signer, err error) {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, k)
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}), k, err
}

// issueLoad asks for certificates as an agent with many pods would.
type issueLoad struct {
	conn   *grpc.ClientConn
	client securityv1alpha1.IstioCertificateServiceClient
	signer jose.Signer
	base   map[string]any
	pods   []string
	agent  string
	next   atomic.Int64
}

// benchPods is how many pods share the load: the bucket of one holds 100.
const benchPods = 400

func newIssueLoad(m *mesh) (*issueLoad, error) {
	l := &issueLoad{}
	keyPEM, err := os.ReadFile(filepath.Join(m.dir, "issuer", "workloads.key"))
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(keyPEM)
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, err
	}
	token, err := os.ReadFile(m.Workloads["shop/frontend"].Token)
	if err != nil {
		return nil, err
	}
	parsed, err := jwt.ParseSigned(string(token), []jose.SignatureAlgorithm{jose.RS256})
	if err != nil {
		return nil, err
	}
	if err := parsed.UnsafeClaimsWithoutVerification(&l.base); err != nil {
		return nil, err
	}
	if l.signer, err = jose.NewSigner(jose.SigningKey{Algorithm: jose.RS256, Key: jose.JSONWebKey{Key: key, KeyID: parsed.Headers[0].KeyID}}, nil); err != nil {
		return nil, err
	}
	agent, err := os.ReadFile(m.Agent.Token)
	if err != nil {
		return nil, err
	}
	l.agent = string(agent)
	if err := l.addPods(m); err != nil {
		return nil, err
	}
	roots, err := os.ReadFile(m.Bundle)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(roots)
	if l.conn, err = grpc.NewClient(m.Server.GRPC, grpc.WithTransportCredentials(credentials.NewClientTLSFromCert(pool, ""))); err != nil {
		return nil, err
	}
	l.client = securityv1alpha1.NewIstioCertificateServiceClient(l.conn)
	deadline := time.Now().Add(10 * time.Second)
	for { // until the server has seen the new pods
		if err = l.run(context.Background(), 1); err == nil || time.Now().After(deadline) {
			return l, err
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// addPods declares more pods of the same account.
func (l *issueLoad) addPods(m *mesh) error {
	return editWorkloads(m, func(list []any) []any {
		i := slices.IndexFunc(list, func(w any) bool { return w.(map[string]any)["serviceAccount"] == "frontend" })
		for n := range benchPods {
			pod := maps.Clone(list[i].(map[string]any))
			uid := fmt.Sprintf("00000000-0000-4000-8000-%012d", n)
			pod["podUID"], pod["podName"] = uid, fmt.Sprintf("frontend-%d", n)
			list, l.pods = append(list, pod), append(l.pods, uid)
		}
		return list
	})
}

// token signs a token of its own for one of the pods.
func (l *issueLoad) token(n int64) (string, error) {
	i := int(n) % len(l.pods)
	raw, err := json.Marshal(l.base)
	if err != nil {
		return "", err
	}
	var claims map[string]any
	if err := json.Unmarshal(raw, &claims); err != nil {
		return "", err
	}
	claims["jti"] = fmt.Sprint(n)
	claims["iat"], claims["nbf"], claims["exp"] = time.Now().Unix()-1, time.Now().Unix()-1, time.Now().Add(10*time.Minute).Unix()
	k8s := claims["kubernetes.io"].(map[string]any)
	k8s["pod"] = map[string]any{"name": fmt.Sprintf("frontend-%d", i), "uid": l.pods[i]}
	return jwt.Signed(l.signer).Claims(claims).Serialize()
}

// issueJob is one request, made before it is timed.
type issueJob struct{ token, csr string }

// run asks for n certificates.
func (l *issueLoad) run(ctx context.Context, n int) error {
	jobs, err := l.prepare(n)
	if err != nil {
		return err
	}
	_, err = l.ask(ctx, jobs)
	return err
}

// prepare makes n tokens and CSRs, each its own.
func (l *issueLoad) prepare(n int) ([]issueJob, error) {
	jobs := make([]issueJob, n)
	for i := range jobs {
		token, err := l.token(l.next.Add(1))
		if err != nil {
			return nil, err
		}
		csr, _, err := newCSR()
		if err != nil {
			return nil, err
		}
		jobs[i] = issueJob{token, string(csr)}
	}
	return jobs, nil
}

// issueCallers is how many callers ask at once.
const issueCallers = 16

// ask has the callers do the jobs and says how long each took.
func (l *issueLoad) ask(ctx context.Context, jobs []issueJob) ([]time.Duration, error) {
	var next atomic.Int64
	var wg sync.WaitGroup
	took := make([]time.Duration, len(jobs))
	errs := make([]error, issueCallers)
	for w := range errs {
		wg.Go(func() {
			for {
				i := int(next.Add(1)) - 1
				if i >= len(jobs) || ctx.Err() != nil {
					return
				}
				began := time.Now()
				if errs[w] = l.one(ctx, jobs[i]); errs[w] != nil {
					return
				}
				took[i] = time.Since(began)
			}
		})
	}
	wg.Wait()
	return took, errors.Join(append(errs, ctx.Err())...)
}

func (l *issueLoad) one(ctx context.Context, job issueJob) error {
	ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+job.token, "castellan-agent-token", l.agent, "clusterid", "Kubernetes")
	resp, err := l.client.CreateCertificate(ctx, &securityv1alpha1.IstioCertificateRequest{Csr: job.csr})
	if err == nil && len(resp.CertChain) < 3 {
		err = fmt.Errorf("a chain of %d", len(resp.CertChain))
	}
	return err
}
