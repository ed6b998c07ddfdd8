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
	"math/big"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
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
	"sigs.k8s.io/yaml"
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
	var floor, served, ratios []float64
	if err := l.run(ctx, 500); err != nil { // warm up
		return err
	}
	for i := range opt.repeat {
		a, err := floorCPU(perCell)
		if err != nil {
			return err
		}
		before, err := cpuTime(m.Server.PID)
		if err != nil {
			return err
		}
		began := time.Now()
		if err := l.run(ctx, perCell); err != nil {
			return err
		}
		wall := time.Since(began)
		after, err := cpuTime(m.Server.PID)
		if err != nil {
			return err
		}
		b := float64((after - before).Microseconds()) / perCell
		floor, served, ratios = append(floor, a), append(served, b), append(ratios, b/a)
		fmt.Printf("  run %d: floor %.0f µs, served %.0f µs, %.2f× (%.0f/s)\n", i+1, a, b, b/a, perCell/wall.Seconds())
	}
	fmt.Printf("  median: floor %.0f µs, served %.0f µs\n", median(floor), median(served))
	reach("server CPU per SVID against the bare floor", median(ratios), 1.6, "×")
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
	issuer string
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
	if err := l.addPods(filepath.Join(m.dir, "workloads.yaml")); err != nil {
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
func (l *issueLoad) addPods(path string) error {
	raw, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	var file map[string]any
	if err := yaml.Unmarshal(raw, &file); err != nil {
		return err
	}
	list, _ := file["workloads"].([]any)
	var model map[string]any
	for _, w := range list {
		if w.(map[string]any)["serviceAccount"] == "frontend" {
			model = w.(map[string]any)
		}
	}
	for i := range benchPods {
		pod := map[string]any{}
		for k, v := range model {
			pod[k] = v
		}
		uid := fmt.Sprintf("00000000-0000-4000-8000-%012d", i)
		pod["podUID"], pod["podName"] = uid, fmt.Sprintf("frontend-%d", i)
		list, l.pods = append(list, pod), append(l.pods, uid)
	}
	file["workloads"] = list
	out, err := yaml.Marshal(file)
	if err != nil {
		return err
	}
	if err := os.WriteFile(path+".new", out, 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
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

// run asks for n certificates from 16 callers; tokens and CSRs are made before.
func (l *issueLoad) run(ctx context.Context, n int) error {
	type job struct{ token, csr string }
	jobs := make([]job, n)
	for i := range jobs {
		token, err := l.token(l.next.Add(1))
		if err != nil {
			return err
		}
		csr, _, err := newCSR()
		if err != nil {
			return err
		}
		jobs[i] = job{token, string(csr)}
	}
	var next atomic.Int64
	var wg sync.WaitGroup
	errs := make([]error, 16)
	for w := range errs {
		wg.Go(func() {
			for {
				i := int(next.Add(1)) - 1
				if i >= n || ctx.Err() != nil {
					return
				}
				call := metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+jobs[i].token, "castellan-agent-token", l.agent, "clusterid", "Kubernetes")
				resp, err := l.client.CreateCertificate(call, &securityv1alpha1.IstioCertificateRequest{Csr: jobs[i].csr})
				if err == nil && len(resp.CertChain) < 3 {
					err = fmt.Errorf("a chain of %d", len(resp.CertChain))
				}
				if err != nil {
					errs[w] = err
					return
				}
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}
