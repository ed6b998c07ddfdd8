package cli_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"sigs.k8s.io/yaml"

	"castellan.dev/internal/tlsconf/tlsconftest"
)

// view is what programs rely on in the JSON of inspect.
type view struct {
	SPIFFEID           string    `json:"spiffeId"`
	Serial             string    `json:"serial"`
	NotBefore          time.Time `json:"notBefore"`
	NotAfter           time.Time `json:"notAfter"`
	SecondsLeft        int64     `json:"secondsLeft"`
	LifeUsedPercent    float64   `json:"lifeUsedPercent"`
	IsCA               bool      `json:"isCA"`
	MaxPathLen         *int      `json:"maxPathLen"`
	Subject            string    `json:"subject"`
	Issuer             string    `json:"issuer"`
	SelfSigned         bool      `json:"selfSigned"`
	PublicKey          string    `json:"publicKey"`
	SignatureAlgorithm string    `json:"signatureAlgorithm"`
	KeyUsage           []string  `json:"keyUsage"`
	ExtKeyUsage        []string  `json:"extKeyUsage"`
	NameConstraints    []string  `json:"nameConstraints"`
	SignedBy           string    `json:"signedBy"`
	SHA256             string    `json:"sha256"`
}

// tenHours are left of twenty, so that seconds more or less change nothing that is printed.
func tenHours(c *x509.Certificate) {
	c.NotBefore, c.NotAfter = time.Now().Add(-10*time.Hour), time.Now().Add(10*time.Hour)
}

func TestInspectFile(t *testing.T) {
	root := tlsconftest.NewRoot(t, inDomain("cluster.local"))
	leaf := root.SVIDIssuer(t).Leaf(t, ordersID, tenHours)
	chain := append(tlsconftest.Chain(t, leaf), root.Cert)
	file := writeFile(t, "chain.pem", pemOf(chain...))

	t.Run("table: SPIFFE ID first, then what signed it", func(t *testing.T) {
		r := castellanRun(t, "cert", "inspect", file).want(t, 0,
			"ECDSA P-256", "digitalSignature, serverAuth, clientAuth", "└─ signed by svid issuer", "└─ signed by root",
			"yes, path length 0", "excluded IP 0.0.0.0/0, ::/0", "excluded DNS (any)", "(9h59m", "s left, 50% of life used)", "serial", "signed by    itself")
		if !strings.HasPrefix(r.out, ordersID+"\n") || r.err != "" {
			t.Errorf("SPIFFE ID is not first, or there was talk:\n%s%s", r.out, r.err)
		}
		if strings.Contains(r.out, "\x1b") {
			t.Error("colour although the output is no terminal")
		}
	})
	t.Run("json", func(t *testing.T) {
		var got []view
		castellanRun(t, "cert", "inspect", file, "-o", "json").want(t, 0).decode(t, &got)
		if len(got) != 3 {
			t.Fatalf("%d certificates, want 3", len(got))
		}
		l, i, r := got[0], got[1], got[2]
		if l.SPIFFEID != ordersID || l.IsCA || l.Serial != leaf.Leaf.SerialNumber.Text(16) || !l.NotAfter.Equal(leaf.Leaf.NotAfter) || !l.NotBefore.Equal(leaf.Leaf.NotBefore) {
			t.Errorf("leaf %+v", l)
		}
		if l.PublicKey != "ECDSA P-256" || l.SignatureAlgorithm != "ECDSA-SHA256" || !slices.Equal(l.ExtKeyUsage, []string{"serverAuth", "clientAuth"}) || l.SignedBy != "svid issuer" || l.Issuer != "CN=svid issuer" {
			t.Errorf("leaf %+v", l)
		}
		if l.SecondsLeft < 35900 || l.SecondsLeft > 36000 || l.LifeUsedPercent < 50 || l.LifeUsedPercent > 51 || l.MaxPathLen != nil {
			t.Errorf("leaf %+v", l)
		}
		if !i.IsCA || i.MaxPathLen == nil || *i.MaxPathLen != 0 || i.Subject != "CN=svid issuer" || i.SignedBy != "root" || len(i.NameConstraints) != 2 || i.SPIFFEID != "" {
			t.Errorf("intermediate %+v", i)
		}
		if !r.IsCA || !r.SelfSigned || r.SPIFFEID != "spiffe://cluster.local" || len(r.SHA256) != 64 || !slices.Equal(r.KeyUsage, []string{"certSign", "crlSign"}) {
			t.Errorf("root %+v", r)
		}
	})
	t.Run("json keeps every promised field, empty ones too", func(t *testing.T) {
		var got []map[string]json.RawMessage
		castellanRun(t, "cert", "inspect", file, "-o", "json").decode(t, &got)
		for n, c := range got {
			for _, key := range []string{"spiffeId", "serial", "notBefore", "notAfter", "secondsLeft", "lifeUsedPercent", "isCA", "subject", "issuer", "selfSigned", "publicKey", "signatureAlgorithm", "sha256"} {
				if _, ok := c[key]; !ok {
					t.Errorf("certificate %d has no %q", n, key)
				}
			}
		}
	})
	t.Run("yaml says what json says", func(t *testing.T) {
		y := castellanRun(t, "cert", "inspect", file, "-o", "yaml").want(t, 0)
		var got []view
		if err := yaml.Unmarshal([]byte(y.out), &got); err != nil || len(got) != 3 || got[0].SPIFFEID != ordersID {
			t.Fatalf("%v\n%s", err, y.out)
		}
	})
	t.Run("pem gives the certificates back", func(t *testing.T) {
		r := castellanRun(t, "cert", "inspect", file, "-o", "pem").want(t, 0)
		if r.out != string(pemOf(chain...)) {
			t.Fatalf("%s", r.out)
		}
	})
	t.Run("stdin and DER", func(t *testing.T) {
		var der bytes.Buffer
		for _, c := range chain {
			der.Write(c.Raw)
		}
		for name, stdin := range map[string]string{"pem": string(pemOf(chain...)), "der": der.String()} {
			var got []view
			castellanWith(t, stdin, "cert", "inspect", "-", "-o", "json").want(t, 0).decode(t, &got)
			if len(got) != 3 || got[0].SPIFFEID != ordersID {
				t.Errorf("%s: %+v", name, got)
			}
		}
		var got []view
		castellanRun(t, "cert", "inspect", writeFile(t, "leaf.der", leaf.Certificate[0]), "-o", "json").want(t, 0).decode(t, &got)
		if len(got) != 1 || got[0].SPIFFEID != ordersID {
			t.Errorf("%+v", got)
		}
	})
	t.Run("a key beside the certificate is passed over and never shown", func(t *testing.T) {
		both := writeFile(t, "both.pem", append(keyPEM(t, leaf), pemOf(chain...)...))
		for _, format := range []string{"table", "json", "yaml", "pem"} {
			r := castellanRun(t, "cert", "inspect", both, "-o", format).want(t, 0)
			if strings.Contains(r.out+r.err, "PRIVATE") {
				t.Errorf("-o %s shows the key", format)
			}
		}
	})
}

// Whatever a certificate holds, it is shown.
func TestInspectOddCertificates(t *testing.T) {
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	_, edKey, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	tests := map[string]struct {
		key      any
		public   any
		template x509.Certificate
		want     []string
	}{
		"rsa, by DNS name": {rsaKey, rsaKey.Public(), x509.Certificate{
			DNSNames: []string{"db.example"}, IPAddresses: []net.IP{net.ParseIP("10.0.0.1")}, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(72 * time.Hour),
		}, []string{"db.example\n", "RSA 2048", "ip           10.0.0.1", "2d23h left"}},
		"ed25519, expired": {edKey, edKey.Public(), x509.Certificate{
			Subject: pkix.Name{CommonName: "old"}, NotBefore: now.Add(-2 * time.Hour), NotAfter: now.Add(-time.Hour),
		}, []string{"CN=old\n", "Ed25519", "(EXPIRED)"}},
		"p-384, not yet valid, nothing to call it by": {p384, p384.Public(), x509.Certificate{
			SerialNumber: big.NewInt(0xbeef), NotBefore: now.Add(time.Hour), NotAfter: now.Add(2 * time.Hour), UnknownExtKeyUsage: nil,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning, x509.ExtKeyUsageMicrosoftServerGatedCrypto},
		}, []string{"serial beef\n", "ECDSA P-384", "NOT YET VALID", "codeSigning"}},
		"permitted names": {p384, p384.Public(), x509.Certificate{
			Subject: pkix.Name{CommonName: "ca"}, IsCA: true, BasicConstraintsValid: true, NotBefore: now, NotAfter: now.Add(time.Hour),
			PermittedURIDomains: []string{"cluster.local"}, PermittedDNSDomains: []string{"svc"}, ExcludedURIDomains: []string{"evil.example"},
		}, []string{"permitted URI cluster.local", "permitted DNS svc", "excluded URI evil.example"}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			if tt.template.SerialNumber == nil {
				tt.template.SerialNumber = big.NewInt(1)
			}
			der, err := x509.CreateCertificate(rand.Reader, &tt.template, &tt.template, tt.public, tt.key)
			if err != nil {
				t.Fatal(err)
			}
			castellanRun(t, "cert", "inspect", writeFile(t, "c.der", der)).want(t, 0, tt.want...)
			castellanRun(t, "cert", "inspect", writeFile(t, "c.der", der), "-o", "json").want(t, 0)
		})
	}
}

func TestInspectBadInput(t *testing.T) {
	root := tlsconftest.NewRoot(t)
	leaf := root.SVIDIssuer(t).Leaf(t, ordersID)
	good := pemOf(tlsconftest.Chain(t, leaf)...)
	damaged := bytes.Replace(good, []byte("-----END"), []byte("----END"), 1)
	request := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: []byte("x")})
	garbled := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte("nonsense")})
	dir := t.TempDir()
	listener, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	tests := map[string]struct {
		args []string
		want string
	}{
		"key only":              {[]string{writeFile(t, "key.pem", keyPEM(t, leaf))}, "holds no certificate, but: PRIVATE KEY; give the file of the certificate"},
		"request":               {[]string{writeFile(t, "csr.pem", request)}, "but: CERTIFICATE REQUEST"},
		"empty":                 {[]string{writeFile(t, "empty.pem", nil)}, "is empty"},
		"blank":                 {[]string{writeFile(t, "blank.pem", []byte("\n \n"))}, "is empty"},
		"garbage":               {[]string{writeFile(t, "garbage", []byte("hello"))}, "holds no certificate (neither PEM nor DER)"},
		"garbled block":         {[]string{writeFile(t, "garbled.pem", append(good, garbled...))}, "PEM block 3"},
		"cut off":               {[]string{writeFile(t, "cut.pem", good[:len(good)-30])}, "a PEM block is cut off or damaged"},
		"damaged first block":   {[]string{writeFile(t, "damaged.pem", damaged)}, "a PEM block is cut off or damaged"},
		"cut DER":               {[]string{writeFile(t, "cut.der", leaf.Certificate[0][:100])}, "holds no certificate"},
		"huge":                  {[]string{writeFile(t, "huge.pem", bytes.Repeat(good, 5<<20/len(good)))}, "is larger than 4194304 bytes"},
		"endless":               {[]string{"/dev/zero"}, "is larger than"},
		"directory":             {[]string{dir}, "is a directory; name a file in it"},
		"missing":               {[]string{dir + "/nothing.pem"}, "there is no file"},
		"host without port":     {[]string{"orders.example"}, "for a server give HOST:PORT"},
		"bare IPv6":             {[]string{"::1:8443"}, "write an IPv6 server as [ADDRESS]:PORT"},
		"socket as file":        {[]string{filepath.Join(dir, "s")}, "is a socket; write unix:"},
		"URL":                   {[]string{"https://orders.example:443"}, "is a URL; give a file, HOST:PORT or unix:SOCKET"},
		"no such port":          {[]string{"127.0.0.1:nosuch"}, `"nosuch" is not a port`},
		"port too big":          {[]string{"127.0.0.1:70000"}, `"70000" is not a port`},
		"unix without a path":   {[]string{"unix:"}, "no socket given"},
		"unix to a file":        {[]string{"unix:" + writeFile(t, "f", nil)}, "is no socket"},
		"client certificate":    {[]string{dir, "--client-cert", "x"}, "--client-cert and --client-key go together"},
		"client, but no server": {[]string{"-", "--client-cert", "x", "--client-key", "y"}, "are for HOST:PORT"},
		"bad client":            {[]string{"127.0.0.1:1", "--client-cert", dir + "/a", "--client-key", dir + "/b"}, "--client-cert: open"},
		"negative":              {[]string{"-", "--expires-within", "-1h"}, "it is negative"},
		"no duration":           {[]string{"-", "--expires-within", "soon"}, "want a duration such as 10m, 36h or 7d"},
		"format":                {[]string{"-", "-o", "xml"}, `-o "xml": want one of table, json, yaml, pem`},
		"two":                   {[]string{"a", "b"}, "2 arguments given; give one, a file, -, HOST:PORT or unix:SOCKET"},
		"none":                  {nil, "0 arguments given"},
		"unknown flag":          {[]string{"-", "--bogus"}, "unknown flag: --bogus; see `castellan cert inspect --help`"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			r := castellanRun(t, append([]string{"cert", "inspect"}, tt.args...)...).want(t, 3)
			if !strings.HasPrefix(r.err, "castellan: ") || !strings.Contains(r.err, tt.want) || r.out != "" {
				t.Errorf("stderr %q, stdout %q, want %q", r.err, r.out, tt.want)
			}
		})
	}
	t.Run("stdin empty", func(t *testing.T) {
		castellanWith(t, "", "cert", "inspect", "-").want(t, 3, "standard input is empty")
	})
	t.Run("not readable", func(t *testing.T) {
		path := writeFile(t, "secret.pem", good)
		if err := os.Chmod(path, 0); err != nil {
			t.Fatal(err)
		}
		if os.Geteuid() == 0 { // who reads every file; nobody does not
			runtime.LockOSThread() // to the kernel this thread alone is another user
			defer runtime.UnlockOSThread()
			if _, err := unix.SetfsuidRetUid(65534); err != nil {
				t.Fatal(err)
			}
			defer func() { _, _ = unix.SetfsuidRetUid(0) }()
		}
		castellanRun(t, "cert", "inspect", path).want(t, 1, "permission denied")
	})
}

func TestExpiresWithin(t *testing.T) {
	root := tlsconftest.NewRoot(t) // for a day
	issuer := root.SVIDIssuer(t)
	hours := chainFile(t, issuer.Leaf(t, ordersID, tenHours))
	expired := chainFile(t, issuer.Leaf(t, ordersID, func(c *x509.Certificate) {
		c.NotBefore, c.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(-10*time.Minute)
	}))
	future := chainFile(t, issuer.Leaf(t, ordersID, func(c *x509.Certificate) {
		c.NotBefore, c.NotAfter = time.Now().Add(time.Hour), time.Now().Add(2*time.Hour)
	}))
	tests := map[string]struct {
		file, within string
		code         int
		want         string
	}{
		"all outlive it":           {hours, "9h", 0, ""},
		"leaf does not":            {hours, "11h", 2, ordersID + " has 9h59m"},
		"days; issuer neither":     {hours, "7d", 2, "svid issuer has 23h59m"},
		"expired":                  {expired, "10m", 2, ordersID + " expired 10m"},
		"expired, and zero":        {expired, "0", 2, "expired"},
		"valid, and zero":          {hours, "0s", 0, ""},
		"not yet valid outlives":   {future, "90m", 0, ""},
		"not asked: expired is ok": {expired, "", 0, ""},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			args := []string{"cert", "inspect", tt.file, "-o", "json"}
			if tt.within != "" {
				args = append(args, "--expires-within", tt.within)
			}
			r := castellanRun(t, args...).want(t, tt.code)
			if !strings.Contains(r.err, tt.want) || (tt.want == "") != (r.err == "") {
				t.Errorf("stderr %q, want %q", r.err, tt.want)
			}
			var got []view
			r.decode(t, &got) // the answer does not disturb the data
			if len(got) != 2 {
				t.Errorf("%d certificates", len(got))
			}
		})
	}
}

// tlsServer serves with the given certificate until the test ends.
func tlsServer(t *testing.T, network string, cfg *tls.Config) string {
	t.Helper()
	address := "127.0.0.1:0"
	if network == "tcp6" {
		address = "[::1]:0"
	}
	l, err := net.Listen(network, address)
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skipf("no %s on this machine: %v", network, err)
	}
	s := httptest.NewUnstartedServer(http.NotFoundHandler())
	s.Listener.Close()
	s.Listener, s.TLS = l, cfg
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.StartTLS()
	t.Cleanup(s.Close)
	return l.Addr().String()
}

func TestInspectServer(t *testing.T) {
	root := tlsconftest.NewRoot(t)
	svid := root.SVIDIssuer(t).Leaf(t, ordersID)
	client := root.SVIDIssuer(t).Leaf(t, frontendID)
	pool := x509.NewCertPool()
	pool.AddCert(root.Cert)
	inspect := func(t *testing.T, args ...string) []view {
		t.Helper()
		var got []view
		castellanRun(t, append([]string{"cert", "inspect", "-o", "json"}, args...)...).want(t, 0).decode(t, &got)
		return got
	}
	for _, network := range []string{"tcp4", "tcp6"} {
		t.Run(network, func(t *testing.T) {
			addr := tlsServer(t, network, &tls.Config{Certificates: []tls.Certificate{*svid}})
			if got := inspect(t, addr); len(got) != 2 || got[0].SPIFFEID != ordersID {
				t.Errorf("%+v", got)
			}
		})
	}
	t.Run("TLS 1.2 only", func(t *testing.T) {
		addr := tlsServer(t, "tcp4", &tls.Config{Certificates: []tls.Certificate{*svid}, MaxVersion: tls.VersionTLS12})
		if got := inspect(t, addr); len(got) != 2 {
			t.Errorf("%+v", got)
		}
	})
	t.Run("a server that asks for a certificate", func(t *testing.T) {
		seen := make(chan int, 4)
		for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
			addr := tlsServer(t, "tcp4", &tls.Config{
				Certificates: []tls.Certificate{*svid}, ClientAuth: tls.RequireAnyClientCert, MinVersion: version, MaxVersion: version,
				VerifyConnection: func(cs tls.ConnectionState) error { seen <- len(cs.PeerCertificates); return nil },
			})
			if got := inspect(t, addr); len(got) != 2 {
				t.Errorf("without one: %+v", got)
			}
			cert, key := chainFile(t, client), writeFile(t, "key.pem", keyPEM(t, client))
			if got := inspect(t, addr, "--client-cert", cert, "--client-key", key); len(got) != 2 {
				t.Errorf("with one: %+v", got)
			}
			if n := <-seen; n != 2 {
				t.Errorf("the server saw %d certificates", n)
			}
		}
	})
	t.Run("server name", func(t *testing.T) {
		other := root.SVIDIssuer(t).Leaf(t, frontendID)
		addr := tlsServer(t, "tcp4", &tls.Config{GetConfigForClient: func(h *tls.ClientHelloInfo) (*tls.Config, error) {
			if h.ServerName == "orders.shop" {
				return &tls.Config{Certificates: []tls.Certificate{*svid}}, nil
			}
			return &tls.Config{Certificates: []tls.Certificate{*other}}, nil
		}})
		if got := inspect(t, addr); got[0].SPIFFEID != frontendID {
			t.Errorf("%+v", got)
		}
		if got := inspect(t, addr, "--server-name", "orders.shop"); got[0].SPIFFEID != ordersID {
			t.Errorf("%+v", got)
		}
	})
	t.Run("a server without TLS", func(t *testing.T) {
		s := httptest.NewServer(http.NotFoundHandler())
		defer s.Close()
		castellanRun(t, "cert", "inspect", s.Listener.Addr().String()).want(t, 1, "speaks no TLS; is it the right port?")
	})
	t.Run("a server that hangs up", func(t *testing.T) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				c.Close()
			}
		}()
		castellanRun(t, "cert", "inspect", l.Addr().String()).want(t, 1, "no certificate from "+l.Addr().String(), "does it speak TLS")
	})
	t.Run("nobody there", func(t *testing.T) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		addr := l.Addr().String()
		l.Close()
		castellanRun(t, "cert", "inspect", addr).want(t, 1, addr+" cannot be reached", "connection refused", "is a server listening there?")
	})
	t.Run("a file called like a server is a file", func(t *testing.T) {
		t.Chdir(t.TempDir())
		if err := os.WriteFile("localhost:1", pemOf(root.Cert), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := inspect(t, "localhost:1"); len(got) != 1 || got[0].Subject != "CN=root" {
			t.Errorf("%+v", got)
		}
	})
}

// An SVID with a SPIFFE ID that is not the first URI SAN still shows it.
func TestInspectSeveralURIs(t *testing.T) {
	leaf := tlsconftest.NewRoot(t).SVIDIssuer(t).Leaf(t, ordersID, func(c *x509.Certificate) {
		c.URIs = append([]*url.URL{{Scheme: "https", Host: "x.example"}}, c.URIs...)
	})
	castellanRun(t, "cert", "inspect", chainFile(t, leaf)).want(t, 0, ordersID+"\n", "uris         https://x.example, "+ordersID)
}
