package e2e_test

import (
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/url"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"castellan.dev/internal/jws/jwstest"
)

// All that a refused caller learns.
const (
	textInvalid         = "request refused: it is malformed or asks for what it may not name"
	textUnauthenticated = "credentials not accepted"
	textDenied          = "identity not permitted"
	textLimited         = "too many requests, retry later"
	textUnavailable     = "not available now, retry later"
)

// wantRefused asserts code and text, and that the server's log has the cause.
func (s *site) wantRefused(t *testing.T, err error, code codes.Code, text, cause string) {
	t.Helper()
	if st := status.Convert(err); st.Code() != code || st.Message() != text {
		t.Fatalf("%v %q, want %v %q", st.Code(), st.Message(), code, text)
	}
	eventually(t, "the cause is in the log", func() error {
		all := logged(s.server.err.String(), map[string]string{"msg": "identity refused"})
		if len(logged(s.server.err.String(), map[string]string{"msg": "identity refused", "code": code.String(), "cause": cause})) == 0 {
			return fmt.Errorf("no %q; the last: %v", cause, all[max(0, len(all)-1):])
		}
		return nil
	})
}

// TestBadCredentials: every kind of bad token, over the wire and against the real
// server; and no log ever has a token.
func TestBadCredentials(t *testing.T) {
	s := newSite(t, "").start()
	client := s.client()
	now := time.Now()
	stranger := jwstest.RSA(t, siteIssuer, "k1")
	foreign := jwstest.RSA(t, "https://other.test", "k1")
	claims := func(p jwstest.Pod, change jwstest.Claims) string {
		return s.issuer.Sign(t, s.issuer.PodClaims(now, p, "castellan.dev").With(change))
	}
	good, agent := s.token(podOrders), s.token(podAgent)
	gone := podOrders
	gone.UID = "pod-gone"
	expired := jwstest.Claims{"iat": now.Unix() - 7200, "nbf": now.Unix() - 7200, "exp": now.Unix() - 3600}
	tokens := []string{good, agent}
	for _, c := range []struct {
		name, workload, agent string
		code                  codes.Code
		text, cause           string
	}{
		{"none", "", "", codes.Unauthenticated, textUnauthenticated, "no workload token"},
		{"malformed", "x.y.z", agent, codes.Unauthenticated, textUnauthenticated, "workload token: token malformed"},
		{"cut short", good[:len(good)-20], agent, codes.Unauthenticated, textUnauthenticated, "workload token: token"},
		{"over 8 KiB", claims(podOrders, jwstest.Claims{"filler": strings.Repeat("x", 9<<10)}), agent, codes.Unauthenticated, textUnauthenticated, "are allowed"},
		{"expired", claims(podOrders, expired), agent, codes.Unauthenticated, textUnauthenticated, "workload token: token expired"},
		{"wrong audience", claims(podOrders, jwstest.Claims{"aud": "vault"}), agent, codes.Unauthenticated, textUnauthenticated, `token is for ["vault"]`},
		{"wrong issuer", foreign.PodToken(t, now, podOrders, "castellan.dev"), agent, codes.Unauthenticated, textUnauthenticated, `issuer "https://other.test" is not configured`},
		{"wrong key", stranger.PodToken(t, now, podOrders, "castellan.dev"), agent, codes.Unauthenticated, textUnauthenticated, "workload token: token signature wrong"},
		{"pod gone", s.token(gone), agent, codes.PermissionDenied, textDenied, `UID "pod-gone" does not exist (any more)`},
		{"another node", good, s.token(podAgentB), codes.PermissionDenied, textDenied, `is for node "node-a", the agent is on "node-b"`},
		{"no agent", good, "", codes.PermissionDenied, textDenied, "asked without an agent token"},
		{"agent that is none", good, s.token(podOther), codes.PermissionDenied, textDenied, "agent token is of shop/other, which is not in agentAccounts"},
		{"agent expired", good, claims(podAgent, expired), codes.Unauthenticated, textUnauthenticated, "agent token: token expired"},
		{"agent of wrong key", good, stranger.PodToken(t, now, podAgent, "castellan.dev"), codes.Unauthenticated, textUnauthenticated, "agent token: token signature wrong"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, _, err := request(client, c.workload, c.agent, newCSR(t))
			s.wantRefused(t, err, c.code, c.text, c.cause)
		})
		tokens = append(tokens, c.workload, c.agent)
	}
	s.mustIssue(client)
	if rows := issued(t, s.path("up.json")); countOf(rows, "pod-orders") != 1 || countOf(rows, "pod-gone") != 0 {
		t.Errorf("the ledger has %v", rows)
	}
	for _, token := range tokens {
		// Neither whole nor its signature, by which it could be put together again.
		if i := strings.LastIndexByte(token, '.'); len(token) > 100 && strings.Contains(s.server.err.String(), token[i+1:]) {
			t.Error("a token is in the server's log")
		}
	}
}

func countOf(rows map[string]issuedRow, pod string) (n int) {
	for _, r := range rows {
		if r.PodUID == pod {
			n++
		}
	}
	return n
}

// TestBadRequests: what a CSR may not ask for is refused, never corrected.
func TestBadRequests(t *testing.T) {
	s := newSite(t, "").start()
	client := s.client()
	t.Setenv("GODEBUG", "rsa1024min=0")
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	p256 := newKey(t, elliptic.P256())
	uri := func(s string) *url.URL {
		u, err := url.Parse(s)
		if err != nil {
			t.Fatal(err)
		}
		return u
	}
	with := func(c x509.CertificateRequest) string { return csrPEM(csrDER(t, p256, c)) }
	isCA, err := asn1.Marshal(struct{ IsCA bool }{true})
	if err != nil {
		t.Fatal(err)
	}
	tampered := csrDER(t, p256, x509.CertificateRequest{})
	tampered[len(tampered)-3] ^= 1
	for _, c := range []struct{ name, csr, cause string }{
		{"nothing", "", "csr"},
		{"half a CSR", newCSR(t)[:150], "csr"},
		{"oversized", newCSR(t) + strings.Repeat("\n", 64<<10), "csr"},
		{"RSA of 1024 bits", csrPEM(csrDER(t, weak, x509.CertificateRequest{})), "1024"},
		{"P-224", csrPEM(csrDER(t, newKey(t, elliptic.P224()), x509.CertificateRequest{})), "P-224"},
		{"bad signature", csrPEM(tampered), "signature"},
		{"CA:true", with(x509.CertificateRequest{ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 19}, Critical: true, Value: isCA}}}), "asks for a CA"},
		{"name of another", with(x509.CertificateRequest{URIs: []*url.URL{uri("spiffe://cluster.local/ns/shop/sa/other")}}), "shop/sa/other"},
		{"name in another domain", with(x509.CertificateRequest{URIs: []*url.URL{uri("spiffe://evil.test/ns/shop/sa/orders")}}), "evil.test"},
		{"two names", with(x509.CertificateRequest{URIs: []*url.URL{uri(ordersID.String()), uri("spiffe://cluster.local/ns/shop/sa/other")}}), "URI"},
		{"DNS name", with(x509.CertificateRequest{DNSNames: []string{"orders.shop.svc"}}), "DNS"},
		{"IP address", with(x509.CertificateRequest{IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}), "IP"},
		{"e-mail address", with(x509.CertificateRequest{EmailAddresses: []string{"root@example.com"}}), "mail"},
		{"common name", with(x509.CertificateRequest{Subject: pkix.Name{CommonName: "orders.shop.svc"}}), "ubject"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, _, err := request(client, s.token(podOrders), s.token(podAgent), c.csr)
			s.wantRefused(t, err, codes.InvalidArgument, textInvalid, c.cause)
		})
	}
	// Its own name, and no name, are what may be asked for.
	for _, csr := range []string{with(x509.CertificateRequest{URIs: []*url.URL{uri(ordersID.String())}}), newCSR(t)} {
		if leaf, _, err := request(client, s.token(podOrders), s.token(podAgent), csr); err != nil || leaf.IsCA || leaf.URIs[0].String() != ordersID.String() {
			t.Errorf("%v %v", leaf, err)
		}
	}
	if rows := issued(t, s.path("up.json")); countOf(rows, "pod-orders") != 2 {
		t.Errorf("the ledger has %v", rows)
	}
}

// TestRateLimit: one pod has a burst of 100 and then 2 a second; who is over it
// is told when to come back, and nobody else is held up.
func TestRateLimit(t *testing.T) {
	s := newSite(t, "").start()
	client, csr := s.client(), newCSR(t)
	workload, agent := s.token(podOrders), s.token(podAgent)
	begun := time.Now()
	taken := 0
	var refused error
	for refused == nil {
		_, _, refused = request(client, workload, agent, csr)
		if refused == nil {
			taken++
		}
		if most := 100 + 2*time.Since(begun).Seconds() + 1; float64(taken) > most {
			t.Fatalf("%d certificates in %v", taken, time.Since(begun))
		}
	}
	if taken < 100 {
		t.Errorf("refused after %d, the burst is 100", taken)
	}
	s.wantRefused(t, refused, codes.ResourceExhausted, textLimited, "rate limit (pod) reached")
	var info *errdetails.RetryInfo
	for _, d := range status.Convert(refused).Details() {
		if i, ok := d.(*errdetails.RetryInfo); ok {
			info = i
		}
	}
	if wait := info.GetRetryDelay().AsDuration(); info == nil || wait <= 0 || wait > time.Second {
		t.Fatalf("retry hint %v", info)
	}
	if _, _, err := request(client, s.token(podOther), agent, csr); err != nil {
		t.Errorf("another pod: %v", err)
	}
	eventually(t, "it is served again", func() error {
		_, _, err := request(client, workload, agent, csr)
		return err
	})
}

// TestKilledWhileIssuing: the server dies in the middle of issuing under load.
// What it had handed out is in its ledger, word for word; and it goes on.
func TestKilledWhileIssuing(t *testing.T) {
	s := newSite(t, "rateLimit: {podBurst: 1000000, podPerSecond: 100000, totalBurst: 1000000, totalPerSecond: 100000}").start()
	handed := map[string]string{} // serial to leaf's hash
	for round := range 2 {
		var mu sync.Mutex
		var wg sync.WaitGroup
		before := len(handed)
		for range 8 {
			client, csr, workload, agent := s.client(), newCSR(t), s.token(podOrders), s.token(podAgent)
			wg.Go(func() {
				for {
					leaf, _, err := request(client, workload, agent, csr)
					if err != nil {
						if status.Code(err) != codes.Unavailable {
							t.Errorf("%v", err)
						}
						return
					}
					hash := sha256.Sum256(leaf.Raw)
					mu.Lock()
					handed[serialOf(leaf.SerialNumber)] = hex.EncodeToString(hash[:])
					mu.Unlock()
				}
			})
		}
		eventually(t, "certificates are being handed out", func() error {
			mu.Lock()
			defer mu.Unlock()
			if n := len(handed) - before; n < 200 {
				return fmt.Errorf("%d", n)
			}
			return nil
		})
		s.server.signal(syscall.SIGKILL)
		s.server.wait(t)
		wg.Wait()
		s.start()
		rows := issued(t, s.path("up.json"))
		for serial, hash := range handed {
			row, found := rows[serial]
			// The intent comes before the signature; the outcome may have died with the server.
			if !found || row.PodUID != podOrders.UID || row.SPIFFEID != ordersID.String() || row.Node != podOrders.Node {
				t.Fatalf("round %d: %s was handed out and the ledger has %+v", round, serial, row)
			}
			if row.LeafSHA256 != "" && row.LeafSHA256 != hash {
				t.Errorf("%s: the ledger has another certificate", serial)
			}
		}
	}
	s.mustIssue(s.client())
	if err := ready(s.http); err != nil {
		t.Error(err)
	}
	if len(handed) < 400 {
		t.Error(errors.New("too few"))
	}
}
