package cli_test

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"castellan.dev/internal/cli"
	"castellan.dev/internal/tlsconf/tlsconftest"
)

func castellan() { os.Exit(cli.Main(os.Args, os.Stdin, os.Stdout, os.Stderr)) }

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"castellan": castellan, "kubectl-castellan": castellan})
}

// result is what one command came to.
type result struct {
	code     int
	out, err string
}

// castellanWith runs the command in this process.
func castellanWith(t testing.TB, stdin string, args ...string) result {
	t.Helper()
	var out, errw bytes.Buffer
	code := cli.Main(append([]string{"castellan"}, args...), strings.NewReader(stdin), &out, &errw)
	return result{code: code, out: out.String(), err: errw.String()}
}

func castellanRun(t testing.TB, args ...string) result {
	t.Helper()
	return castellanWith(t, "", args...)
}

// want fails unless the exit code is code and every text stands in what was said.
func (r result) want(t testing.TB, code int, texts ...string) result {
	t.Helper()
	if r.code != code {
		t.Fatalf("exit code %d, want %d\n%s%s", r.code, code, r.out, r.err)
	}
	for _, text := range texts {
		if !strings.Contains(r.out+r.err, text) {
			t.Fatalf("no %q in\n%s%s", text, r.out, r.err)
		}
	}
	return r
}

// decode reads what went to stdout as JSON.
func (r result) decode(t testing.TB, into any) {
	t.Helper()
	if err := json.Unmarshal([]byte(r.out), into); err != nil {
		t.Fatalf("%v in\n%s%s", err, r.out, r.err)
	}
}

const (
	frontendID = "spiffe://cluster.local/ns/shop/sa/frontend"
	ordersID   = "spiffe://cluster.local/ns/shop/sa/orders"
)

// inDomain gives an authority the SPIFFE ID of a trust domain, as Castellan's have.
func inDomain(td string) tlsconftest.Change {
	return func(c *x509.Certificate) { c.URIs = []*url.URL{{Scheme: "spiffe", Host: td}} }
}

func writeFile(t testing.TB, name string, data []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func pemOf(certs ...*x509.Certificate) []byte {
	var out []byte
	for _, c := range certs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return out
}

func keyPEM(t testing.TB, c *tls.Certificate) []byte {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(c.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

// chainFile writes a chain as PEM, leaf first.
func chainFile(t testing.TB, c *tls.Certificate) string {
	t.Helper()
	return writeFile(t, "svid.pem", pemOf(tlsconftest.Chain(t, c)...))
}

// mustWrite writes a file below the working directory.
func mustWrite(t testing.TB, path, data string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(data), 0o600); err != nil {
		t.Fatal(err)
	}
}
