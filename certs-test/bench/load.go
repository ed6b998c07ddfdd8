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
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// load is a bounded HTTP load over mutual TLS (or in the clear where tls is nil).
type load struct {
	addr string
	tls  *tls.Config
	// size is the body asked for and expected; path, if set, is asked for instead.
	size int
	path string
	// header is further lines of each request, each with its line end.
	header string
	// fresh makes a new connection for every request.
	fresh bool
	conns int
	// streams is how many requests an HTTP/2 connection carries at once; 0 is HTTP/1.1.
	streams int
	// perSecond paces all connections together; 0 is a closed loop.
	perSecond float64
}

type outcome struct {
	requests int64
	failed   int64
	resumed  int64
	wall     time.Duration
	latency  []time.Duration
	firstErr error
}

// clientTLS is the loader's side: an SVID, TLS 1.3, X25519, no resumption. The
// server's chain is verified against the roots; its name is not, as the peers
// show an SVID, which has none.
func clientTLS(m *material, protocols ...string) *tls.Config {
	return &tls.Config{
		Certificates:           []tls.Certificate{m.cert},
		MinVersion:             tls.VersionTLS13,
		CurvePreferences:       []tls.CurveID{tls.X25519},
		SessionTicketsDisabled: true,
		NextProtos:             protocols,
		InsecureSkipVerify:     true,
		VerifyConnection: func(cs tls.ConnectionState) error {
			inter := x509.NewCertPool()
			for _, c := range cs.PeerCertificates[1:] {
				inter.AddCert(c)
			}
			_, err := cs.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: m.pool, Intermediates: inter, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
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

func (l load) target() string {
	if l.path != "" {
		return l.path
	}
	// The last of the 20 rules, the one that allows, is for this path.
	return fmt.Sprintf("/r%d/%d", benchRules-1, l.size)
}

// asker does one request at a time. After an error it starts afresh.
type asker interface {
	ask(ctx context.Context) error
	close()
}

// askers returns one for each request that is to be under way at once.
func (l load) askers(resumed *atomic.Int64) []asker {
	var out []asker
	for range l.conns {
		if l.streams == 0 {
			out = append(out, &asker1{load: l, resumed: resumed,
				request: []byte("GET " + l.target() + " HTTP/1.1\r\nHost: orders.shop\r\nUser-Agent: bench\r\nAccept: */*\r\n" + l.header + "\r\n")})
			continue
		}
		// A transport of its own keeps to one connection.
		t := &http.Transport{TLSClientConfig: l.tls, DisableCompression: true, Protocols: new(http.Protocols)}
		t.Protocols.SetHTTP2(true)
		for range l.streams {
			out = append(out, &asker2{load: l, transport: t})
		}
	}
	return out
}

// run opens the connections and sends requests for d. What a new connection costs
// is not part of it, but where each request makes one.
func (l load) run(ctx context.Context, d time.Duration) outcome {
	s := l.open(ctx)
	defer s.close()
	return s.run(ctx, d)
}

// session is a load with its connections open.
type session struct {
	load
	askers   []asker
	resumed  atomic.Int64
	firstErr error
}

// open makes every connection and does one request on each, in turn.
func (l load) open(ctx context.Context) *session {
	s := &session{load: l}
	s.askers = l.askers(&s.resumed)
	for _, a := range s.askers {
		if s.firstErr = a.ask(ctx); s.firstErr != nil {
			break
		}
	}
	return s
}

// once opens the connections, with one request on each, and closes them.
func (l load) once(ctx context.Context) error {
	s := l.open(ctx)
	defer s.close()
	return s.firstErr
}

func (s *session) close() {
	for _, a := range s.askers {
		a.close()
	}
}

// run sends requests for d and counts what came back; anything but a whole 200
// with the expected body is a failure.
func (s *session) run(ctx context.Context, d time.Duration) outcome {
	if s.firstErr != nil {
		return outcome{failed: 1, firstErr: s.firstErr}
	}
	var out outcome
	var mu sync.Mutex
	began := time.Now()
	var wg sync.WaitGroup
	for n, a := range s.askers {
		wg.Go(func() {
			p := pacer{end: began.Add(d)}
			if s.perSecond > 0 {
				p.interval = time.Duration(float64(len(s.askers)) / s.perSecond * float64(time.Second))
			}
			p.next = began.Add(p.interval * time.Duration(n) / time.Duration(len(s.askers)))
			part := p.run(ctx, a)
			mu.Lock()
			defer mu.Unlock()
			out.add(part)
		})
	}
	wg.Wait()
	out.resumed, out.wall = s.resumed.Load(), time.Since(began)
	return out
}

func (o *outcome) add(part outcome) {
	o.requests, o.failed = o.requests+part.requests, o.failed+part.failed
	o.latency = append(o.latency, part.latency...)
	if o.firstErr == nil {
		o.firstErr = part.firstErr
	}
}

// err says why a run is no measurement.
func (o outcome) err() error {
	if o.failed > 0 || o.requests == 0 {
		return fmt.Errorf("%d requests done, %d failed: %w", o.requests, o.failed, o.firstErr)
	}
	return nil
}

// pacer says when the next request is due.
type pacer struct {
	end, next time.Time
	interval  time.Duration
}

// run has one asker ask whenever it is due.
func (p *pacer) run(ctx context.Context, a asker) (out outcome) {
	for {
		due, ok := p.wait(ctx)
		if !ok {
			return out
		}
		if err := a.ask(ctx); err != nil {
			out.add(outcome{failed: 1, firstErr: err})
			continue
		}
		out.requests++
		if p.interval > 0 {
			out.latency = append(out.latency, time.Since(due))
		}
	}
}

// wait returns when the next request is due and from when its latency counts:
// from when it was due, so that a stall is not left out.
func (p *pacer) wait(ctx context.Context) (due time.Time, ok bool) {
	due = time.Now()
	if p.interval > 0 {
		time.Sleep(time.Until(p.next))
		due, p.next = p.next, p.next.Add(p.interval)
	}
	return due, time.Now().Before(p.end) && ctx.Err() == nil
}

// asker1 speaks HTTP/1.1 on a connection of its own.
type asker1 struct {
	load
	request []byte
	resumed *atomic.Int64
	conn    net.Conn
	r       *bufio.Reader
}

func (a *asker1) close() {
	if a.conn != nil {
		a.conn.Close()
	}
	a.conn = nil
}

func (a *asker1) ask(ctx context.Context) error {
	if a.fresh {
		a.close()
	}
	if a.conn == nil {
		conn, err := a.dial(ctx)
		if err != nil {
			return err
		}
		a.conn, a.r = conn, bufio.NewReaderSize(conn, 8<<10)
		if t, ok := conn.(*tls.Conn); ok && t.ConnectionState().DidResume {
			a.resumed.Add(1)
		}
	}
	_ = a.conn.SetDeadline(time.Now().Add(10 * time.Second))
	err := exchange(a.conn, a.r, a.request, a.size)
	if err != nil {
		a.close()
	}
	return err
}

// exchange does one request and reads the whole answer.
func exchange(conn net.Conn, r *bufio.Reader, request []byte, size int) error {
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
			if length != size {
				return fmt.Errorf("content-length %d", length)
			}
			_, err := r.Discard(length)
			return err
		case len(s) > 15 && strings.EqualFold(s[:15], "content-length:"):
			if length, err = strconv.Atoi(strings.TrimSpace(s[15:])); err != nil {
				return err
			}
		}
	}
}

// asker2 is one stream at a time of an HTTP/2 connection shared with others.
type asker2 struct {
	load
	transport *http.Transport
}

func (a *asker2) close() { a.transport.CloseIdleConnections() }

func (a *asker2) ask(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+a.addr+a.target(), nil)
	if err != nil {
		return err
	}
	resp, err := a.transport.RoundTrip(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	n, err := io.Copy(io.Discard, resp.Body)
	switch {
	case err != nil:
		return err
	case resp.StatusCode != http.StatusOK || resp.ProtoMajor != 2 || n != int64(a.size):
		return fmt.Errorf("%s %s with %d bytes", resp.Proto, resp.Status, n)
	}
	return nil
}
