package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// load is a bounded HTTP/1.1 load over mutual TLS (or in the clear where tls is nil).
type load struct {
	addr string
	tls  *tls.Config
	path string
	// fresh makes a new connection for every request.
	fresh bool
	conns int
	// perSecond paces all connections together; 0 is a closed loop.
	perSecond float64
}

type outcome struct {
	requests int64
	failed   int64
	wall     time.Duration
	latency  []time.Duration
	firstErr error
}

// clientTLS is the loader's side: an SVID, TLS 1.3, X25519, no resumption. The
// server's chain is verified against the roots; its name is not, as the peers
// show an SVID, which has none.
func clientTLS(cert tls.Certificate, roots *x509.CertPool) *tls.Config {
	return &tls.Config{
		Certificates:           []tls.Certificate{cert},
		MinVersion:             tls.VersionTLS13,
		CurvePreferences:       []tls.CurveID{tls.X25519},
		SessionTicketsDisabled: true,
		NextProtos:             []string{"http/1.1"},
		InsecureSkipVerify:     true,
		VerifyConnection: func(cs tls.ConnectionState) error {
			inter := x509.NewCertPool()
			for _, c := range cs.PeerCertificates[1:] {
				inter.AddCert(c)
			}
			_, err := cs.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: inter, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
			return err
		},
	}
}

func (l load) dial(ctx context.Context) (net.Conn, error) {
	d := &net.Dialer{Timeout: 10 * time.Second}
	if l.tls == nil {
		return d.DialContext(ctx, "tcp", l.addr)
	}
	return (&tls.Dialer{NetDialer: d, Config: l.tls}).DialContext(ctx, "tcp", l.addr)
}

// run sends requests for d and counts what came back; anything but a whole 200
// with the expected body is a failure.
func (l load) run(ctx context.Context, d time.Duration) outcome {
	request := []byte("GET " + l.path + " HTTP/1.1\r\nHost: orders.shop\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n")
	var out outcome
	var mu sync.Mutex
	var requests, failed atomic.Int64
	began := time.Now()
	end := began.Add(d)
	var wg sync.WaitGroup
	for n := range l.conns {
		wg.Go(func() {
			var latency []time.Duration
			var conn net.Conn
			var r *bufio.Reader
			defer func() {
				if conn != nil {
					conn.Close()
				}
				mu.Lock()
				out.latency = append(out.latency, latency...)
				mu.Unlock()
			}()
			fail := func(err error) {
				failed.Add(1)
				mu.Lock()
				if out.firstErr == nil {
					out.firstErr = err
				}
				mu.Unlock()
				if conn != nil {
					conn.Close()
				}
				conn = nil
			}
			var interval time.Duration
			if l.perSecond > 0 {
				interval = time.Duration(float64(l.conns) / l.perSecond * float64(time.Second))
			}
			next := began.Add(interval * time.Duration(n) / time.Duration(l.conns))
			for time.Now().Before(end) && ctx.Err() == nil {
				if interval > 0 {
					time.Sleep(time.Until(next))
				}
				// Latency counts from when the request was due, so that a stall is not left out.
				due := time.Now()
				if interval > 0 {
					due, next = next, next.Add(interval)
				}
				if conn == nil || l.fresh {
					if conn != nil {
						conn.Close()
					}
					var err error
					if conn, err = l.dial(ctx); err != nil {
						conn = nil
						fail(err)
						continue
					}
					r = bufio.NewReaderSize(conn, 8<<10)
				}
				_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
				if err := exchange(conn, r, request); err != nil {
					fail(err)
					continue
				}
				requests.Add(1)
				if l.perSecond > 0 {
					latency = append(latency, time.Since(due))
				}
			}
		})
	}
	wg.Wait()
	out.requests, out.failed, out.wall = requests.Load(), failed.Load(), time.Since(began)
	return out
}

// exchange does one request and reads the whole answer.
func exchange(conn net.Conn, r *bufio.Reader, request []byte) error {
	if _, err := conn.Write(request); err != nil {
		return err
	}
	length := -1
	for first := true; ; first = false {
		line, err := r.ReadSlice('\n')
		if err != nil {
			return err
		}
		s := strings.TrimRight(string(line), "\r\n")
		switch {
		case first:
			if !strings.HasPrefix(s, "HTTP/1.1 200") {
				return errors.New(s)
			}
		case s == "":
			if length != 1024 {
				return fmt.Errorf("content-length %d", length)
			}
			_, err := io.CopyN(io.Discard, r, int64(length))
			return err
		case len(s) > 15 && strings.EqualFold(s[:15], "content-length:"):
			if length, err = strconv.Atoi(strings.TrimSpace(s[15:])); err != nil {
				return err
			}
		}
	}
}
