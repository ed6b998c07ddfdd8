package server_test

import (
	"context"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"
	istiov1 "istio.io/api/security/v1alpha1"

	castellanv1 "castellan.dev/api/castellan/v1"
	"castellan.dev/ca"
	"castellan.dev/ca/attest"
	"castellan.dev/ca/server"
	"castellan.dev/identity"
	"castellan.dev/internal/jws"
	"castellan.dev/internal/jws/jwstest"
)

// The constant texts, all that a caller learns.
const (
	textInvalid         = "request refused: it is malformed or asks for what it may not name"
	textUnauthenticated = "credentials not accepted"
	textDenied          = "identity not permitted"
	textUnavailable     = "not available now, retry later"
	textInternal        = "internal error"
)

func textOf(code codes.Code) string {
	switch code {
	case codes.InvalidArgument:
		return textInvalid
	case codes.Unauthenticated:
		return textUnauthenticated
	case codes.PermissionDenied:
		return textDenied
	case codes.Unavailable:
		return textUnavailable
	}
	return textInternal
}

// checkRefusal asserts the code and constant text that the caller got, and that
// the log, and only the log, has the cause.
func (w *world) checkRefusal(t *testing.T, err error, code codes.Code, cause string) {
	t.Helper()
	if st := status.Convert(err); st.Code() != code || st.Message() != textOf(code) {
		t.Fatalf("%v %q, want %v %q", st.Code(), st.Message(), code, textOf(code))
	}
	records := w.log.take(t)
	last := map[string]any{}
	if len(records) > 0 {
		last = records[len(records)-1]
	}
	if last["msg"] != "identity refused" || last["code"] != code.String() || !strings.Contains(fmt.Sprint(last["cause"]), cause) {
		t.Fatalf("log %v, want the cause %q", records, cause)
	}
	if peer, _ := last["peer"].(string); !strings.HasPrefix(peer, "127.0.0.1:") {
		t.Errorf("log names the peer %q", peer)
	}
	for _, r := range records {
		if r["msg"] == "identity issued" {
			t.Fatal("something was issued")
		}
	}
}

func (w *world) rows(t *testing.T) uint64 {
	t.Helper()
	n, err := w.ledger.Rows(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestRefusedCredentials: tokens that are malformed, oversized, expired, of the
// wrong audience, issuer or key, of gone pods and other nodes; whether they are
// verified here or by review.
func TestRefusedCredentials(t *testing.T) {
	inBothModes(t, refusedCredentials)
}

// inBothModes runs a test with tokens verified here and by review.
func inBothModes(t *testing.T, test func(t *testing.T, review bool)) {
	t.Run("local", func(t *testing.T) { test(t, false) })
	t.Run("review", func(t *testing.T) { test(t, true) })
}

// refusedByReview are the rows whose token the API server itself refuses, for its
// pod or account, before we can say what is wrong with it.
var refusedByReview = []string{"pod gone", "account made anew", "pod of another", "pod under other name"}

func refusedCredentials(t *testing.T, review bool) {
	w := newWorld(t, options{review: review})
	stranger := jwstest.RSA(t, issuerName, "k1")        // our issuer's name and kid, another key
	other := jwstest.RSA(t, "https://other.test", "k1") // an issuer nobody configured
	unknown := jwstest.RSA(t, issuerName, "k9")
	now := time.Now()
	claims := func(change jwstest.Claims) string {
		return w.issuer.Sign(t, w.issuer.PodClaims(now, orders(), "castellan.dev").With(change))
	}
	pod := func(change func(*jwstest.Pod)) string {
		p := orders()
		change(&p)
		return w.token(p)
	}
	good := w.token(orders())
	endUser := w.issuer.Sign(t, w.issuer.Base(now, "castellan.dev"))

	tests := map[string]struct {
		workload, agent string
		more            []string
		code            codes.Code
		cause           string
	}{
		"nothing":              {"", "", nil, codes.Unauthenticated, "no workload token"},
		"no workload token":    {"", w.agentToken, nil, codes.Unauthenticated, "no workload token"},
		"basic authorization":  {"", w.agentToken, []string{"authorization", "Basic " + good}, codes.Unauthenticated, `does not begin with "Bearer "`},
		"two authorizations":   {good, w.agentToken, []string{"authorization", "Bearer " + good}, codes.Unauthenticated, "metadata authorization stands 2 times"},
		"two agent tokens":     {good, w.agentToken, []string{"castellan-agent-token", w.agentToken}, codes.Unauthenticated, "castellan-agent-token stands 2 times"},
		"not a token":          {"hello", w.agentToken, nil, codes.Unauthenticated, "workload token: token malformed"},
		"token cut short":      {good[:len(good)/2], w.agentToken, nil, codes.Unauthenticated, "workload token: token malformed"},
		"token over 8 KiB":     {good + strings.Repeat("A", jws.MaxSize), w.agentToken, nil, codes.Unauthenticated, "metadata authorization has"},
		"agent token too big":  {good, w.agentToken + strings.Repeat("A", jws.MaxSize), nil, codes.Unauthenticated, "are allowed"},
		"expired":              {claims(jwstest.Claims{"exp": now.Unix() - 1}), w.agentToken, nil, codes.Unauthenticated, "token expired"},
		"not yet valid":        {claims(jwstest.Claims{"nbf": now.Unix() + 60}), w.agentToken, nil, codes.Unauthenticated, "token not yet valid"},
		"no expiry":            {claims(jwstest.Claims{"exp": nil}), w.agentToken, nil, codes.Unauthenticated, "no exp"},
		"wrong audience":       {claims(jwstest.Claims{"aud": "vault"}), w.agentToken, nil, codes.Unauthenticated, `token is for ["vault"]`},
		"no audience":          {claims(jwstest.Claims{"aud": nil}), w.agentToken, nil, codes.Unauthenticated, "token audience not accepted"},
		"wrong issuer":         {other.PodToken(t, now, orders(), "castellan.dev"), w.agentToken, nil, codes.Unauthenticated, `issuer "https://other.test" is not configured`},
		"wrong key, same kid":  {stranger.PodToken(t, now, orders(), "castellan.dev"), w.agentToken, nil, codes.Unauthenticated, "token signature wrong"},
		"unknown kid":          {unknown.PodToken(t, now, orders(), "castellan.dev"), w.agentToken, nil, codes.Unauthenticated, `kid "k9"`},
		"an end user's token":  {endUser, w.agentToken, nil, codes.Unauthenticated, "no claim kubernetes.io"},
		"sub of another":       {claims(jwstest.Claims{"sub": "system:serviceaccount:shop:payments"}), w.agentToken, nil, codes.Unauthenticated, `sub is "system:serviceaccount:shop:payments"`},
		"odd namespace":        {pod(func(p *jwstest.Pod) { p.Namespace = "shop/x" }), w.agentToken, nil, codes.Unauthenticated, "is not a namespace"},
		"not bound to a node":  {pod(func(p *jwstest.Pod) { p.Node = "" }), w.agentToken, nil, codes.Unauthenticated, "token's node has no usable name"},
		"not bound to a pod":   {pod(func(p *jwstest.Pod) { p.Name = "" }), w.agentToken, nil, codes.Unauthenticated, "token's pod has no usable name"},
		"no pod UID":           {pod(func(p *jwstest.Pod) { p.UID = "" }), w.agentToken, nil, codes.Unauthenticated, "does not say the UIDs"},
		"other cluster":        {good, w.agentToken, []string{"clusterid", "east"}, codes.Unauthenticated, `caller says cluster "east", its token is of "Kubernetes"`},
		"pod gone":             {pod(func(p *jwstest.Pod) { p.UID = "pod-gone" }), w.agentToken, nil, codes.PermissionDenied, `UID "pod-gone" does not exist (any more)`},
		"account made anew":    {pod(func(p *jwstest.Pod) { p.AccountUID = "sa-old" }), w.agentToken, nil, codes.PermissionDenied, `has UID "sa-orders", the token says "sa-old"`},
		"pod of another":       {pod(func(p *jwstest.Pod) { p.Account = "payments" }), w.agentToken, nil, codes.PermissionDenied, `pod "pod-orders" is of shop/orders, the token of shop/payments`},
		"pod under other name": {pod(func(p *jwstest.Pod) { p.Name = "orders-2" }), w.agentToken, nil, codes.PermissionDenied, `has name "orders-1"`},
		"stolen to other node": {good, w.token(agentPod("node-b")), nil, codes.PermissionDenied, `is for node "node-a", the agent is on "node-b"`},
		"pod moved":            {pod(func(p *jwstest.Pod) { p.Node = "node-b"; p.NodeUID = "uid-b" }), w.token(agentPod("node-b")), nil, codes.PermissionDenied, `runs on node "node-a", the token says "node-b"`},
		"node replaced":        {pod(func(p *jwstest.Pod) { p.NodeUID = "uid-old" }), w.agentToken, nil, codes.PermissionDenied, "it was replaced"},
		"no agent":             {good, "", nil, codes.PermissionDenied, "shop/orders asked without an agent token and is not in directCallers"},
		"itself as the agent":  {good, good, nil, codes.PermissionDenied, "agent token is of shop/orders, which is not in agentAccounts"},
		"agent token expired": {good, w.issuer.Sign(t, w.issuer.PodClaims(now, agentPod("node-a"), "castellan.dev").With(jwstest.Claims{"exp": now.Unix() - 1})),
			nil, codes.Unauthenticated, "agent token: token expired"},
		"agent token of wrong key":                              {good, stranger.PodToken(t, now, agentPod("node-a"), "castellan.dev"), nil, codes.Unauthenticated, "agent token: token signature wrong"},
		"agent token malformed":                                 {good, "x.y.z", nil, codes.Unauthenticated, "agent token: token malformed"},
		"agent asks for itself without being an agent's second": {w.agentToken, "", nil, codes.PermissionDenied, "asked without an agent token"},
	}
	request, _ := csr(t)
	before := w.rows(t)
	for name, tt := range tests {
		t.Run("trust-02 "+name, func(t *testing.T) {
			if review && slices.Contains(refusedByReview, name) {
				tt.code, tt.cause = codes.Unauthenticated, "token refused by its issuer"
			} else if review && tt.code == codes.Unauthenticated {
				tt.cause = "" // the API server's words, or ours about its answer
			}
			_, err := w.create(as(t.Context(), tt.workload, tt.agent, tt.more...), &istiov1.IstioCertificateRequest{Csr: request})
			w.checkRefusal(t, err, tt.code, tt.cause)
			_, err = w.mint(as(t.Context(), tt.workload, tt.agent, tt.more...), &castellanv1.MintJWTRequest{Audience: []string{"x"}})
			w.checkRefusal(t, err, tt.code, tt.cause)
		})
	}
	if after := w.rows(t); after != before {
		t.Errorf("%d ledger rows came of refusals", after-before)
	}
	for name, tt := range tests {
		for _, token := range []string{tt.workload, tt.agent} {
			// The signature is what makes a token a credential.
			if i := strings.LastIndex(token, "."); i > 0 && len(token)-i > 20 && w.log.holds(token[i+1:]) {
				t.Errorf("%s: the token is in the log", name)
			}
		}
	}
}

func TestRefusedRequests(t *testing.T) {
	w := newWorld(t, options{})
	weakRSA, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Skip("this build makes no weak keys: ", err)
	}
	uri := func(s string) func(*x509.CertificateRequest) {
		return func(r *x509.CertificateRequest) {
			u, err := url.Parse(s)
			if err != nil {
				t.Fatal(err)
			}
			r.URIs = append(r.URIs, u)
		}
	}
	with := func(change ...func(*x509.CertificateRequest)) string { s, _ := csr(t, change...); return s }
	tampered := func() string {
		block, _ := pem.Decode([]byte(with()))
		block.Bytes[len(block.Bytes)-3] ^= 1
		return string(pem.EncodeToMemory(block))
	}
	tests := map[string]string{
		"empty":               "",
		"not PEM":             "hello",
		"a certificate":       "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
		"cut short":           with()[:200],
		"oversized":           with() + strings.Repeat("\n", 20<<10),
		"almost a message":    strings.Repeat("A", 63<<10),
		"bad signature":       tampered(),
		"weak RSA":            csrOf(t, weakRSA),
		"P-224":               csrOf(t, newEC(t, elliptic.P224())),
		"foreign SPIFFE ID":   with(uri("spiffe://cluster.local/ns/shop/sa/payments")),
		"foreign domain":      with(uri("spiffe://evil.test/ns/shop/sa/orders")),
		"two URIs":            with(uri("spiffe://cluster.local/ns/shop/sa/orders"), uri("spiffe://cluster.local/ns/shop/sa/payments")),
		"https URI":           with(uri("https://orders.shop")),
		"DNS name":            with(func(r *x509.CertificateRequest) { r.DNSNames = []string{"orders.shop.svc"} }),
		"IP address":          with(func(r *x509.CertificateRequest) { r.IPAddresses = []net.IP{net.IPv4(10, 0, 0, 1)} }),
		"e-mail":              with(func(r *x509.CertificateRequest) { r.EmailAddresses = []string{"root@shop"} }),
		"foreign common name": with(func(r *x509.CertificateRequest) { r.Subject = pkix.Name{CommonName: "payments"} }),
		"CA extension": with(func(r *x509.CertificateRequest) {
			r.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 19}, Critical: true, Value: []byte{0x30, 3, 1, 1, 0xff}}}
		}),
		"unknown extension": with(func(r *x509.CertificateRequest) {
			r.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 2, 3, 4}, Value: []byte{5, 0}}}
		}),
	}
	before := w.rows(t)
	for name, request := range tests {
		t.Run(name, func(t *testing.T) {
			_, err := w.create(as(t.Context(), w.token(orders()), w.agentToken), &istiov1.IstioCertificateRequest{Csr: request})
			w.checkRefusal(t, err, codes.InvalidArgument, "")
		})
	}
	if after := w.rows(t); after != before {
		t.Errorf("%d ledger rows came of refusals", after-before)
	}
	t.Run("same name is no harm", func(t *testing.T) {
		if _, err := w.create(as(t.Context(), w.token(orders()), w.agentToken),
			&istiov1.IstioCertificateRequest{Csr: with(uri("spiffe://cluster.local/ns/shop/sa/orders"))}); err != nil {
			t.Fatal(err)
		}
	})
	for _, size := range []int{64 << 10, 100 << 10} {
		// gRPC's own answer would be ResourceExhausted, which clients retry.
		t.Run(fmt.Sprintf("over the request bound: %d", size), func(t *testing.T) {
			w.log.take(t)
			_, err := w.create(as(t.Context(), w.token(orders()), w.agentToken), &istiov1.IstioCertificateRequest{Csr: strings.Repeat("A", size)})
			if st := status.Convert(err); st.Code() != codes.InvalidArgument || st.Message() != textInvalid {
				t.Fatal(err)
			}
			if r := w.log.take(t); len(r) != 1 || r[0]["reason"] != "message-size" {
				t.Errorf("log %v", r)
			}
		})
	}
	for name, audience := range map[string][]string{
		"no audience": nil, "too many": make([]string, 17), "a long one": {strings.Repeat("x", 2000)}, "an empty one": {""},
	} {
		t.Run("mint: "+name, func(t *testing.T) {
			w.log.take(t)
			_, err := w.mint(as(t.Context(), w.token(orders()), w.agentToken), &castellanv1.MintJWTRequest{Audience: audience})
			w.checkRefusal(t, err, codes.InvalidArgument, "audience")
		})
	}
}

// faultyIssuer answers with an error, as a signing path in trouble does.
type faultyIssuer struct{ err error }

func (f faultyIssuer) Issue(context.Context, ca.Request) (*ca.Issued, error) { return nil, f.err }

func TestFaultsKeepTheirCodes(t *testing.T) {
	disk := errors.New("write /var/lib/ledger.db: no space left on device")
	tests := map[string]struct {
		err  error
		code codes.Code
	}{
		"ledger full":    {fmt.Errorf("%w: %w", ca.ErrLedger, disk), codes.Unavailable},
		"no issuer":      {ca.ErrNoIssuer, codes.Unavailable},
		"lint":           {ca.ErrLint, codes.Internal},
		"anything else":  {disk, codes.Internal},
		"caller's fault": {&ca.RequestError{Field: "csr", Reason: "odd"}, codes.InvalidArgument},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, options{issuer: func(server.Issuer) server.Issuer { return faultyIssuer{tt.err} }})
			request, _ := csr(t)
			_, err := w.create(as(t.Context(), w.token(orders()), w.agentToken), &istiov1.IstioCertificateRequest{Csr: request})
			w.checkRefusal(t, err, tt.code, tt.err.Error())
		})
	}
}

// blindPods knows nothing now.
type blindPods struct{}

var errBlind = errors.New("connection to the API server refused")

func (blindPods) Pod(context.Context, attest.PodRef) (attest.Pod, error) {
	return attest.Pod{}, errBlind
}
func (blindPods) OnNode(context.Context, string, identity.Account) ([]attest.Pod, error) {
	return nil, errBlind
}

func TestUnknownIsUnavailable(t *testing.T) {
	w := newWorld(t, options{pods: func(attest.Pods) attest.Pods { return blindPods{} }})
	request, _ := csr(t)
	_, err := w.create(as(t.Context(), w.token(orders()), w.agentToken), &istiov1.IstioCertificateRequest{Csr: request})
	w.checkRefusal(t, err, codes.Unavailable, "pods are not known now: connection to the API server refused")
}

// TestRemovedPodIsRefused: removing the entry is deleting the pod, at once in both modes.
func TestRemovedPodIsRefused(t *testing.T) { inBothModes(t, removedPodIsRefused) }

func removedPodIsRefused(t *testing.T, review bool) {
	w := newWorld(t, options{review: review})
	request, _ := csr(t)
	token := w.token(orders())
	if _, err := w.create(as(t.Context(), token, w.agentToken), &istiov1.IstioCertificateRequest{Csr: request}); err != nil {
		t.Fatal(err)
	}
	w.log.take(t)
	w.setPods()
	_, err := w.create(as(t.Context(), token, w.agentToken), &istiov1.IstioCertificateRequest{Csr: request})
	w.checkRefusal(t, err, codes.PermissionDenied, "does not exist (any more)")
}

func impersonate(t *testing.T, id any) *structpb.Struct {
	t.Helper()
	s, err := structpb.NewStruct(map[string]any{"ImpersonatedIdentity": id, "CertSigner": ""})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestDirectCallersAndImpersonation(t *testing.T) { inBothModes(t, directCallersAndImpersonation) }

func directCallersAndImpersonation(t *testing.T, review bool) {
	ztunnel := jwstest.Pod{Namespace: "castellan-system", Account: "ztunnel", AccountUID: "sa-z", Name: "z-1", UID: "pod-z", Node: "node-a", NodeUID: "uid-a"}
	w := newWorld(t, options{review: review, direct: []identity.Account{account(t, "shop/orders")}, trusted: []identity.Account{account(t, "castellan-system/ztunnel")}})
	elsewhere := jwstest.Pod{Namespace: "shop", Account: "payments", AccountUID: "sa-p", Name: "p-1", UID: "pod-p", Node: "node-b", NodeUID: "uid-b"}
	w.setPods(orders(), ztunnel, elsewhere)
	request, _ := csr(t)
	const id = "spiffe://cluster.local/ns/shop/sa/"
	tests := map[string]struct {
		token    string
		metadata *structpb.Struct
		want     string
		code     codes.Code
		cause    string
	}{
		"direct caller":              {w.token(orders()), nil, id + "orders", codes.OK, "direct"},
		"node proxy for a pod":       {w.token(ztunnel), impersonate(t, id+"orders"), id + "orders", codes.OK, "impersonation"},
		"node proxy, other node":     {w.token(ztunnel), impersonate(t, id+"payments"), "", codes.PermissionDenied, `no pod runs on node "node-a"`},
		"node proxy, foreign domain": {w.token(ztunnel), impersonate(t, "spiffe://evil.test/ns/shop/sa/orders"), "", codes.PermissionDenied, "no workload of"},
		"node proxy, odd ID":         {w.token(ztunnel), impersonate(t, "spiffe://cluster.local/x"), "", codes.PermissionDenied, "no workload of"},
		"node proxy, no ID":          {w.token(ztunnel), impersonate(t, "orders"), "", codes.PermissionDenied, `asked for "orders"`},
		"node proxy for itself":      {w.token(ztunnel), nil, "", codes.PermissionDenied, "not in directCallers"},
		"direct caller impersonates": {w.token(orders()), impersonate(t, id+"payments"), "", codes.PermissionDenied, "not in trustedNodeAccounts"},
		"empty name":                 {w.token(ztunnel), impersonate(t, ""), "", codes.InvalidArgument, "ImpersonatedIdentity is no name"},
		"a number":                   {w.token(ztunnel), impersonate(t, 7), "", codes.InvalidArgument, "ImpersonatedIdentity is no name"},
	}
	for name, tt := range tests {
		t.Run("trust-02 "+name, func(t *testing.T) {
			w.log.take(t)
			resp, err := w.create(as(t.Context(), tt.token, ""), &istiov1.IstioCertificateRequest{Csr: request, Metadata: tt.metadata})
			if tt.code != codes.OK {
				w.checkRefusal(t, err, tt.code, tt.cause)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			certs, _ := readChain(t, resp.GetCertChain())
			if got, err := identity.FromCertificate(certs[0]); err != nil || got.String() != tt.want {
				t.Fatalf("%v, %v", got, err)
			}
			if r := w.log.take(t); r[0]["attestor"] != tt.cause {
				t.Errorf("attestor %v, want %v", r[0]["attestor"], tt.cause)
			}
		})
	}
}

func TestAgentAttestsItself(t *testing.T) { inBothModes(t, agentAttestsItself) }

func agentAttestsItself(t *testing.T, review bool) {
	w := newWorld(t, options{review: review})
	request, _ := csr(t)
	resp, err := w.create(as(t.Context(), w.agentToken, w.agentToken), &istiov1.IstioCertificateRequest{Csr: request})
	if err != nil {
		t.Fatal(err)
	}
	certs, _ := readChain(t, resp.GetCertChain())
	if id, _ := identity.FromCertificate(certs[0]); id.String() != "spiffe://cluster.local/ns/castellan-system/sa/castellan-agent" {
		t.Fatal(id)
	}
	entry, err := w.ledger.BySerial(t.Context(), certs[0].SerialNumber.Text(16))
	if err != nil || entry.Node != "node-a" || entry.Attestor != "agent-self" {
		t.Fatalf("%+v, %v", entry, err)
	}
}
