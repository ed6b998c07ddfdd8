package e2e_test

import (
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
)

// direct is a client with the frontend's certificate that no proxy of ours stands
// beside: what it sends reaches the receiver as it is.
func (a *appMesh) direct(t *testing.T) *http.Client {
	t.Helper()
	src := source(t, a.file().Workloads[frontend].Socket)
	cfg := tlsconfig.MTLSClientConfig(src, src, tlsconfig.AuthorizeID(ordersID))
	cfg.MinVersion = tls.VersionTLS13
	client := &http.Client{Timeout: patience, Transport: &http.Transport{TLSClientConfig: cfg}}
	t.Cleanup(client.CloseIdleConnections)
	return client
}

// look asks the application what it was given.
func look(t *testing.T, client *http.Client, url string, header http.Header) (int, string, seen) {
	t.Helper()
	req, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header = header
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	var s seen
	if resp.StatusCode == http.StatusOK {
		if err := json.Unmarshal(body, &s); err != nil {
			t.Fatalf("%v in %s", err, body)
		}
	}
	return resp.StatusCode, string(body), s
}

// testForwarded: x-forwarded-client-cert is the proxy's own, whatever was sent,
// by way of the caller's proxy and past it.
func (a *appMesh) testForwarded(t *testing.T) {
	forged := http.Header{
		"X-Forwarded-Client-Cert": {"By=spiffe://cluster.local/ns/shop/sa/orders;Hash=00;URI=spiffe://cluster.local/ns/shop/sa/payments", "URI=spiffe://second"},
		"X-Harmless":              {"stays"},
	}
	for name, try := range map[string]func() (int, string, seen){
		"through its proxy": func() (int, string, seen) {
			return look(t, plainClient, a.url(frontend, onHTTP, "/headers?q=1"), forged.Clone())
		},
		"past its proxy": func() (int, string, seen) {
			return look(t, a.direct(t), "https://"+a.inbound[onHTTP]+"/headers?q=1", forged.Clone())
		},
		// A header named in Connection is dropped hop by hop; ours must come all the same.
		"nominated in Connection": func() (int, string, seen) {
			h := forged.Clone()
			h.Set("Connection", "x-forwarded-client-cert")
			return look(t, a.direct(t), "https://"+a.inbound[onHTTP]+"/headers?q=1", h)
		},
	} {
		code, body, got := try()
		if code != 200 {
			t.Errorf("%s: %d %q", name, code, body)
			continue
		}
		xfcc := got.Header["X-Forwarded-Client-Cert"]
		if len(xfcc) != 1 || !strings.HasPrefix(xfcc[0], "By="+ordersID.String()+";Hash=") || !strings.HasSuffix(xfcc[0], ";URI="+frontendID.String()) || strings.Contains(xfcc[0], "payments") {
			t.Errorf("%s: x-forwarded-client-cert %q", name, xfcc)
		}
		if got.Header.Get("X-Harmless") != "stays" || got.URI != "/headers?q=1" {
			t.Errorf("%s: the application saw %+v", name, got)
		}
	}
	// A refusal is one constant line, and its reason stands in the access log only.
	code, body, err := a.get(intruder, onHTTP, "/headers?marker=refused")
	if err != nil || code != 403 || body != "access denied\n" {
		t.Errorf("the intruder: %d %q %v", code, body, err)
	}
	eventually(t, "the reason is in the access log", func() error {
		if len(logged(a.receiver.out.String(), map[string]string{"policy": "castellan-system/guests-call-nothing", "status": "403", "path": "/headers"})) == 0 {
			return fmt.Errorf("not found")
		}
		return nil
	})
}

const appsTokens = `apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {name: apps-users, namespace: shop}
spec:
  selector: {matchLabels: {app: orders}}
  jwtRules:
  - issuer: https://users.castellan.test
    audiences: ["payments"]
    jwks: '%s'
    forwardOriginalToken: %v
    outputClaimToHeaders: [{header: x-user, claim: sub}]
`

// testTokens: claim headers are the proxy's own, and the token goes no further
// unless forwardOriginalToken.
func (a *appMesh) testTokens(t *testing.T) {
	f := a.file()
	jwks, err := os.ReadFile(f.JWT.JWKS)
	if err != nil {
		t.Fatal(err)
	}
	client, url := a.direct(t), "https://"+a.inbound[onHTTP]+"/headers"
	forged := http.Header{"X-User": {"admin", "root"}}
	with := func(token string) http.Header {
		h := forged.Clone()
		h.Set("Authorization", token)
		return h
	}
	valid := bearer(t, f.JWT.ValidToken)
	for _, forward := range []bool{false, true} {
		a.write("60-users.yaml", fmt.Sprintf(appsTokens, strings.TrimSpace(string(jwks)), forward))
		eventually(t, fmt.Sprintf("forwardOriginalToken: %v", forward), func() error {
			code, body, got := look(t, client, url, with(valid))
			token := got.Header.Get("Authorization")
			if code != 200 || !slices.Equal(got.Header["X-User"], []string{"alice"}) || forward != (token == valid) || !forward && token != "" {
				return fmt.Errorf("%d %q %v", code, body, got.Header["X-User"])
			}
			return nil
		})
		// No token, no claim: what was sent in its place does not get through.
		if code, body, got := look(t, client, url, forged.Clone()); code != 200 || len(got.Header["X-User"]) != 0 {
			t.Errorf("without a token: %d %q, x-user %q", code, body, got.Header["X-User"])
		}
		for name, token := range map[string]string{
			"expired": bearer(t, f.JWT.ExpiredToken), "malformed": "Bearer x.y.z", "signature": valid[:len(valid)-8] + "AAAAAAAA",
		} {
			if code, body, _ := look(t, client, url, with(token)); code != 401 || body != "authentication required\n" {
				t.Errorf("%s: %d %q", name, code, body)
			}
		}
	}
	for _, log := range []string{a.receiver.out.String(), a.receiver.err.String(), a.callers[frontend].out.String(), a.callers[frontend].err.String()} {
		if strings.Contains(log, valid[len(valid)-40:]) {
			t.Error("a token is in a log")
		}
	}
}
