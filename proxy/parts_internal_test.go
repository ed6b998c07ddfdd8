package proxy

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	castellanv1 "castellan.dev/api/castellan/v1"
	"castellan.dev/internal/config"
	"castellan.dev/internal/tlsconf"
)

func TestSniff(t *testing.T) {
	for in, want := range map[string]sniffed{
		"": sniffedNothing, "G": sniffedNothing, "GET": sniffedNothing, "GET ": sniffedNothing,
		"GET /": sniffedHTTP1, "OPTIONS *": sniffedNothing, "OPTIONS * HTTP/1.1": sniffedHTTP1, "GET http://x/": sniffedHTTP1, "PROPFIND /": sniffedHTTP1,
		"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n": sniffedHTTP2, "PRI * HTTP/2.0\r\n\r\nSM": sniffedNothing,
		"PRI * HTTP/2.0\r\n\r\nXX": sniffedHTTP1, "PRI": sniffedNothing,
		// What a tolerant application reads as HTTP is for the strict parser to refuse.
		"get /": sniffedHTTP1, " GET /": sniffedHTTP1, "\r\n\r\nGET /": sniffedHTTP1, "\nGET  /": sniffedHTTP1, "GET\t/": sniffedHTTP1,
		"X-1!_~ /": sniffedHTTP1, "Get HTTPS://x": sniffedHTTP1, "get *  http/1.1": sniffedHTTP1, "\r\n": sniffedNothing,
		"\r\nPRI * HTTP/2.0\r\n\r\nSM\r\n\r\n": sniffedHTTP1,
		strings.Repeat("A", sniffLength-1):     sniffedNothing, strings.Repeat("A", sniffLength): sniffedHTTP1,
		strings.Repeat("A", sniffLength-4) + " htt": sniffedHTTP1, strings.Repeat("\n", sniffLength): sniffedHTTP1,
		"SELECT * FROM t": sniffedOther, "EHLO host.example": sniffedOther, "EHLO h": sniffedNothing, "PING\r\n": sniffedOther,
		"\x16\x03\x01": sniffedOther, "GET\x0b/": sniffedOther, "HELO mail": sniffedOther, "EHLO mail": sniffedOther, "\x00": sniffedOther,
	} {
		if got := sniff([]byte(in)); got != want {
			t.Errorf("%q: %d, want %d", in, got, want)
		}
	}
	for c := range 256 {
		b := []byte{byte(c)}
		if got := sniff(b); (got == sniffedNothing) != (isToken(byte(c)) || strings.IndexByte(blank, byte(c)) >= 0) {
			t.Errorf("byte %#x: %d", c, got)
		}
	}
}

func inlineBytes(s string) *corev3.DataSource {
	return &corev3.DataSource{Specifier: &corev3.DataSource_InlineBytes{InlineBytes: []byte(s)}}
}

// What we read by hand is what Envoy's own types wrote.
func TestParseSecretReadsEnvoys(t *testing.T) {
	marshal := func(m proto.Message) []byte {
		b, err := proto.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	s, err := parseSecret(marshal(&tlsv3.Secret{Name: "default", Type: &tlsv3.Secret_TlsCertificate{TlsCertificate: &tlsv3.TlsCertificate{
		CertificateChain: inlineBytes("chain"), PrivateKey: inlineBytes("key"), Password: inlineBytes("ignored"),
	}}}))
	if err != nil || string(s.chain) != "chain" || string(s.key) != "key" || s.roots != nil {
		t.Fatalf("%q %v", s.chain, err)
	}
	s, err = parseSecret(marshal(&tlsv3.Secret{Name: "ROOTCA", Type: &tlsv3.Secret_ValidationContext{ValidationContext: &tlsv3.CertificateValidationContext{
		TrustedCa:                 &corev3.DataSource{Specifier: &corev3.DataSource_InlineString{InlineString: "roots"}},
		MatchTypedSubjectAltNames: []*tlsv3.SubjectAltNameMatcher{{SanType: tlsv3.SubjectAltNameMatcher_URI}},
		OnlyVerifyLeafCertCrl:     true,
		AllowExpiredCertificate:   true,
		VerifyCertificateHash:     []string{"x"},
		CustomValidatorConfig:     &corev3.TypedExtensionConfig{Name: "spiffe"},
	}}}))
	if err != nil || string(s.roots) != "roots" || s.chain != nil {
		t.Fatalf("%q %v", s.roots, err)
	}
	_, err = parseSecret(marshal(&tlsv3.Secret{Type: &tlsv3.Secret_TlsCertificate{TlsCertificate: &tlsv3.TlsCertificate{
		PrivateKey: &corev3.DataSource{Specifier: &corev3.DataSource_Filename{Filename: "/etc/shadow"}},
	}}}))
	if err == nil || err.Error() != "malformed secret: data is not inline" {
		t.Fatalf("err %v", err)
	}
}

func FuzzParseSecret(f *testing.F) {
	b, err := proto.Marshal(&tlsv3.Secret{Name: "default", Type: &tlsv3.Secret_TlsCertificate{TlsCertificate: &tlsv3.TlsCertificate{
		CertificateChain: inlineBytes("chain"), PrivateKey: inlineBytes("key"),
	}}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := parseSecret(b)
		if err != nil {
			return
		}
		var want tlsv3.Secret
		if proto.Unmarshal(b, &want) != nil {
			return // stricter in what we pass over
		}
		if chain := want.GetTlsCertificate().GetCertificateChain().GetInlineBytes(); chain != nil && len(s.chain) == 0 && len(chain) > 0 {
			t.Fatalf("missed %q", chain)
		}
	})
}

func serviceOf(t *testing.T, r *castellanv1.ServiceIdentity, before *service, trust *tlsconf.Trust) *service {
	t.Helper()
	s, err := newService(r, before)
	if err != nil {
		t.Fatal(err)
	}
	return s.resolve(trust)
}

func TestPickPassesOverTheFailed(t *testing.T) {
	const id = "spiffe://cluster.local/ns/shop/sa/orders"
	trust := &tlsconf.Trust{TrustDomain: spiffeid.RequireTrustDomainFromString("cluster.local")}
	r := &castellanv1.ServiceIdentity{Namespace: "shop", Name: "orders", ExpectedIds: []string{id}, Ports: []*castellanv1.ServicePort{{Number: 80}}}
	for _, a := range []string{"10.0.0.1", "10.0.0.2", "10.0.0.3"} {
		r.Endpoints = append(r.Endpoints, &castellanv1.Endpoint{Address: a, Ports: map[uint32]uint32{80: 8080}, SpiffeId: id})
	}
	port := serviceOf(t, r, nil, trust).port(80)
	now := time.Now()
	seen := map[string]int{}
	for range 30 {
		seen[port.pick(now, nil, wanted{}).address]++
	}
	for a, n := range seen {
		if n != 10 {
			t.Errorf("%s was picked %d times of 30", a, n)
		}
	}
	failed := port.endpoints[0]
	failed.failed(now)
	for range 30 {
		if port.pick(now, nil, wanted{}) == failed {
			t.Fatal("a failed endpoint was picked")
		}
	}
	// An update of the service keeps what is known of its endpoints.
	again := serviceOf(t, r, serviceOf(t, r, &service{ports: []*servicePort{port}}, trust), trust).port(80)
	for range 30 {
		if again.pick(now, nil, wanted{}).address == failed.address {
			t.Fatal("an update forgot the failure")
		}
	}
	if got := port.pick(now, port.endpoints, wanted{}); got != nil {
		t.Fatalf("%v was picked twice", got.address)
	}
	for _, e := range port.endpoints {
		e.failed(now)
	}
	if port.pick(now, nil, wanted{}) == nil {
		t.Fatal("with all failed, none was tried")
	}
	picked := false
	for range 3 {
		picked = picked || port.pick(now.Add(retryAfter+1), nil, wanted{}) == failed
	}
	if !picked {
		t.Fatal("a failure was never forgotten")
	}
}

// Connections are shared only where endpoint, identity, certificate and epoch are equal.
func TestPoolKeys(t *testing.T) {
	a := &endpoint{address: "10.0.0.1:80", allowed: []spiffeid.ID{spiffeid.RequireFromString("spiffe://a.example/x")}, endpointHealth: &endpointHealth{}}
	b := &endpoint{address: a.address, allowed: []spiffeid.ID{spiffeid.RequireFromString("spiffe://a.example/y")}, endpointHealth: a.endpointHealth}
	k := a.pool("1")
	if a.pool("1") != k {
		t.Fatal("the same connections have two names")
	}
	keys := map[string]bool{k.http1: true, k.h2: true, a.pool("2").http1: true, b.pool("1").http1: true}
	a.epoch.Add(1)
	keys[a.pool("1").http1] = true
	if len(keys) != 5 {
		t.Fatalf("names are shared: %v", keys)
	}
	if !keyHasSerial(k.http1, "1") || keyHasSerial(k.http1, "2") {
		t.Fatal("serial is not found in the name")
	}
	if n := testing.AllocsPerRun(100, func() { a.pool("1") }); n > 0 {
		t.Fatalf("%v allocations", n)
	}
}

func TestServiceWithBadPort(t *testing.T) {
	_, err := newService(&castellanv1.ServiceIdentity{Namespace: "shop", Name: "x", Ports: []*castellanv1.ServicePort{{Number: 65616}}}, nil)
	if err == nil || err.Error() != `service "shop/x": port 65616` {
		t.Fatalf("err %v", err)
	}
}

// flaky is a listener without descriptors for a while.
type flaky struct {
	net.Listener
	mu     sync.Mutex
	errors int
	calls  []time.Time
}

func (f *flaky) Accept() (net.Conn, error) {
	f.mu.Lock()
	f.calls = append(f.calls, time.Now())
	fail := len(f.calls) <= f.errors
	f.mu.Unlock()
	if fail {
		return nil, &net.OpError{Op: "accept", Err: syscall.EMFILE}
	}
	return f.Listener.Accept()
}

// Accept errors are waited out, longer each time, and then serving goes on.
func TestAcceptBacksOff(t *testing.T) {
	cfg := config.Proxy{}
	cfg.Limits.MaxConnections, cfg.Limits.MaxPerSource = 1, 1
	p, err := New(Config{Proxy: cfg, Registerer: prometheus.NewRegistry(), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer p.stopServing()
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := &flaky{Listener: inner, errors: 5}
	served := make(chan struct{})
	a := &acceptor{p: p, side: inboundSide, listener: l, limits: &p.limits, secure: func(_ context.Context, c net.Conn, _ netip.AddrPort) func(*place) {
		c.Close()
		close(served)
		return nil
	}}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	var serving sync.WaitGroup
	go func() { done <- a.run(ctx, &serving) }()
	c, err := net.Dial("tcp", inner.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	select {
	case <-served:
	case <-time.After(15 * time.Second):
		t.Fatal("never served")
	}
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	serving.Wait()
	if d := l.calls[5].Sub(l.calls[0]); d < 31*minAcceptPause {
		t.Fatalf("five failures were waited out in %s", d)
	}
}

// One connection's panic costs that connection alone.
func TestPanicIsContained(t *testing.T) {
	var out strings.Builder
	p, err := New(Config{Registerer: prometheus.NewRegistry(), Log: slog.New(slog.NewTextHandler(&out, nil))})
	if err != nil {
		t.Fatal(err)
	}
	defer p.stopServing()
	a, b := net.Pipe()
	defer b.Close()
	p.guard(inboundSide, a, func() { panic("odd") })
	if _, err := a.Write([]byte("x")); err == nil || !errors.Is(err, net.ErrClosed) && !strings.Contains(err.Error(), "closed") {
		t.Fatalf("the connection is open: %v", err)
	}
	if !strings.Contains(out.String(), "connection panicked") {
		t.Fatal("not logged")
	}
}
