package engine_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"castellan.dev/proxy/engine"
)

const benchRequest = "GET /orders/17?x=1 HTTP/1.1\r\nHost: orders.shop\r\nUser-Agent: loader/1.0\r\nAccept: */*\r\n" +
	"Accept-Encoding: gzip\r\nX-Request-Id: 3f2504e0-4f89-11d3-9a0c-0305e82c3301\r\n\r\n"

const benchResponse = "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nDate: Sat, 21 Nov 2026 07:08:10 GMT\r\nContent-Length: 1024\r\n\r\n"

// benchApp answers every request head with 1 KB, as cheaply as can be.
func benchApp(b testing.TB) string {
	response := []byte(benchResponse + strings.Repeat("x", 1024))
	return rawApp(b, func(c net.Conn, _ *bufio.Reader) {
		c.SetDeadline(time.Time{})
		buf := make([]byte, 4096)
		n := 0
		for {
			m, err := c.Read(buf[n:])
			if err != nil {
				return
			}
			n += m
			if !bytes.HasSuffix(buf[:n], []byte("\r\n\r\n")) {
				continue
			}
			n = 0
			if _, err := c.Write(response); err != nil {
				return
			}
		}
	})
}

// hot is a Session that costs nothing.
type hot struct {
	addr string
	set  []engine.Field
}

func (h *hot) Begin(r *engine.Request) engine.Verdict {
	if len(r.Values("authorization")) != 0 || len(r.Values("user-agent")) != 1 {
		return engine.Verdict{Status: 500}
	}
	return engine.Verdict{Upstream: engine.Upstream{Key: h.addr}, Set: h.set}
}

func (h *hot) Dial(ctx context.Context, _ *engine.Request) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(ctx, "tcp", h.addr)
}

func (h *hot) End(*engine.Request, *engine.Outcome) {}

func newHot(addr string) *hot {
	return &hot{addr: addr, set: []engine.Field{{Name: "x-forwarded-client-cert", Value: "By=spiffe://cluster.local/ns/shop/sa/orders;URI=spiffe://cluster.local/ns/shop/sa/frontend"}}}
}

// drive sends the request b.N times over one connection.
func drive(b *testing.B, conn net.Conn) {
	b.Helper()
	defer conn.Close()
	buf := make([]byte, 8192)
	size := 0
	once := func() {
		if _, err := io.WriteString(conn, benchRequest); err != nil {
			b.Fatal(err)
		}
		n := 0
		for head := -1; head < 0 || n < head+4+1024; {
			m, err := conn.Read(buf[n:])
			if err != nil {
				b.Fatal(err)
			}
			n += m
			if head < 0 {
				head = bytes.Index(buf[:n], []byte("\r\n\r\n"))
			}
		}
		size = n
	}
	once()
	b.ReportAllocs()
	b.ResetTimer()
	for range b.N {
		once()
	}
	b.StopTimer()
	_ = size
}

func benchTLS(b testing.TB) (server, client *tls.Config) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		b.Fatal(err)
	}
	tpl := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"h"}, NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, tpl, tpl, &key.PublicKey, key)
	if err != nil {
		b.Fatal(err)
	}
	leaf, _ := x509.ParseCertificate(der)
	roots := x509.NewCertPool()
	roots.AddCert(leaf)
	cert := tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	server = &tls.Config{Certificates: []tls.Certificate{cert}, ClientAuth: tls.RequireAnyClientCert, MinVersion: tls.VersionTLS13}
	client = &tls.Config{Certificates: []tls.Certificate{cert}, RootCAs: roots, ServerName: "h", MinVersion: tls.VersionTLS13}
	return server, client
}

// listen serves each connection of a loopback listener.
func listen(b testing.TB, serve func(net.Conn)) string {
	return rawApp(b, func(c net.Conn, _ *bufio.Reader) {
		c.SetDeadline(time.Time{})
		serve(c)
	})
}

// bareLoop is the floor: it finds the end of heads and passes bytes on, to one
// upstream connection per client connection.
func bareLoop(addr string, client net.Conn) {
	up, err := net.Dial("tcp", addr)
	if err != nil {
		return
	}
	defer up.Close()
	in, out := make([]byte, 4096), make([]byte, 4096)
	for {
		n := 0
		for !bytes.HasSuffix(in[:n], []byte("\r\n\r\n")) {
			m, err := client.Read(in[n:])
			if err != nil {
				return
			}
			n += m
		}
		if _, err := up.Write(in[:n]); err != nil {
			return
		}
		n = 0
		for head := -1; head < 0 || n < head+4+1024; {
			m, err := up.Read(out[n:])
			if err != nil {
				return
			}
			n += m
			if head < 0 {
				head = bytes.Index(out[:n], []byte("\r\n\r\n"))
			}
		}
		if _, err := client.Write(out[:n]); err != nil {
			return
		}
	}
}

func BenchmarkPlain(b *testing.B) {
	addr := benchApp(b)
	b.Run("null", func(b *testing.B) { drive(b, dialTo(b, addr)) })
	b.Run("bare", func(b *testing.B) {
		drive(b, dialTo(b, listen(b, func(c net.Conn) { bareLoop(addr, c) })))
	})
	b.Run("engine", func(b *testing.B) {
		e := engine.New(engine.Config{})
		defer e.Close()
		drive(b, dialTo(b, listen(b, func(c net.Conn) { e.ServeConn(context.Background(), c, false, newHot(addr)) })))
	})
	b.Run("reverseproxy", func(b *testing.B) { drive(b, dialTo(b, reverseProxy(b, addr, nil))) })
}

func BenchmarkTLS(b *testing.B) {
	addr := benchApp(b)
	server, client := benchTLS(b)
	dial := func(b *testing.B, addr string) net.Conn {
		conn := tls.Client(dialTo(b, addr), client)
		if err := conn.Handshake(); err != nil {
			b.Fatal(err)
		}
		return conn
	}
	b.Run("bare", func(b *testing.B) {
		drive(b, dial(b, listen(b, func(c net.Conn) { bareLoop(addr, tls.Server(c, server)) })))
	})
	b.Run("engine", func(b *testing.B) {
		e := engine.New(engine.Config{})
		defer e.Close()
		drive(b, dial(b, listen(b, func(c net.Conn) {
			e.ServeConn(context.Background(), tls.Server(c, server), false, newHot(addr))
		})))
	})
	b.Run("reverseproxy", func(b *testing.B) { drive(b, dial(b, reverseProxy(b, addr, server))) })
}

func dialTo(b testing.TB, addr string) net.Conn {
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		b.Fatal(err)
	}
	return conn
}

func reverseProxy(b testing.TB, addr string, cfg *tls.Config) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	transport := &http.Transport{}
	s := &http.Server{Handler: &httputil.ReverseProxy{Transport: transport, Rewrite: func(r *httputil.ProxyRequest) {
		r.SetURL(&url.URL{Scheme: "http", Host: addr})
	}}}
	address := l.Addr().String()
	if cfg != nil {
		l = tls.NewListener(l, cfg)
	}
	go s.Serve(l)
	b.Cleanup(func() { s.Close(); transport.CloseIdleConnections() })
	return address
}

// TestFastPathAllocations: an ordinary keep-alive exchange allocates nothing.
func TestFastPathAllocations(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector makes pools forget")
	}
	addr := benchApp(t)
	e := engine.New(engine.Config{})
	defer e.Close()
	var wg sync.WaitGroup
	near, far := tcpPair(t)
	wg.Go(func() { e.ServeConn(context.Background(), far, false, newHot(addr)) })
	buf := make([]byte, 8192)
	request := []byte(benchRequest)
	exchange := func() {
		near.Write(request)
		for n := 0; n < 1024; {
			m, err := near.Read(buf)
			if err != nil {
				t.Fatal(err)
			}
			n += m
		}
	}
	for range 10 {
		exchange()
	}
	// The whole process is counted: client, engine and application. A garbage
	// collection may empty a pool, so a fraction is allowed.
	if n := testing.AllocsPerRun(2000, exchange); n >= 1 {
		t.Errorf("%v allocations for one exchange, want 0", n)
	}
	near.Close()
	wg.Wait()
}

func tcpPair(t testing.TB) (near, far net.Conn) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	near = dialTo(t, l.Addr().String())
	if far, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	return near, far
}
