package proxy_test

import (
	"crypto/tls"
	"io"
	"net"
	"testing"
	"time"

	"castellan.dev/internal/config"
)

// recorder keeps what is written and answers nothing.
type recorder struct {
	net.Conn
	wrote chan []byte
}

func (r *recorder) Write(b []byte) (int, error) {
	r.wrote <- append([]byte(nil), b...)
	return len(b), nil
}

// clientHello is the first flight of a client of the mesh.
func clientHello(t *testing.T) []byte {
	t.Helper()
	a, b := net.Pipe()
	defer b.Close()
	r := &recorder{Conn: a, wrote: make(chan []byte, 8)}
	done := make(chan struct{})
	go func() { defer close(done); _ = tls.Client(r, clientTLS(nil, "istio-http/1.1")).Handshake() }()
	hello := <-r.wrote
	a.Close()
	<-done
	return hello
}

// Sockets that send nothing, or stop halfway through a handshake, hold no slot:
// others are served at once and not only when those time out.
func TestStalledHandshakesHoldNobodyUp(t *testing.T) {
	hello := clientHello(t)
	for name, sends := range map[string][]byte{
		"nothing":          nil,
		"half a hello":     hello[:len(hello)/2],
		"a hello":          hello,
		"a record's start": {0x16, 3},
	} {
		for _, m := range []string{"STRICT", "PERMISSIVE"} {
			t.Run(name+" under "+m, func(t *testing.T) {
				r, ca := mesh(t, mode(m), limit(func(l *config.ProxyLimits) {
					l.MaxHandshakes, l.HandshakeTimeout = 1, config.Duration(10*patience)
				}))
				for range 20 {
					c, err := net.Dial("tcp", r.inbound)
					if err != nil {
						t.Fatal(err)
					}
					defer c.Close()
					if _, err := c.Write(sends); err != nil {
						t.Fatal(err)
					}
				}
				eventually(t, "all have been accepted", func() bool { return r.metric("castellan_proxy_connections") >= 20 })
				dialTLS(t, r.inbound, ca.Leaf(t, frontend), "istio-http/1.1").mustGet(200)
			})
		}
	}
}

// Who has not said who he is gives way, the oldest first; who has stays.
func TestStrangersGiveWay(t *testing.T) {
	const places = 20
	r, ca := mesh(t, strict, limit(func(l *config.ProxyLimits) {
		l.MaxConnections, l.MaxPerSource, l.HandshakeTimeout = places, places, config.Duration(10*patience)
	}))
	first := dialTLS(t, r.inbound, ca.Leaf(t, frontend), "http/1.1")
	first.mustGet(200)
	var strangers []net.Conn
	for range 2 * places {
		c, err := net.Dial("tcp", r.inbound)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		strangers = append(strangers, c)
	}
	later := dialTLS(t, r.inbound, ca.Leaf(t, payments), "http/1.1")
	later.mustGet(200)
	first.mustGet(200)
	_ = strangers[0].SetReadDeadline(time.Now().Add(patience))
	if _, err := io.ReadAll(strangers[0]); err != nil && timeout(err) {
		t.Fatal("the oldest stranger was kept")
	}
	if r.metric("castellan_proxy_connections_closed_total") == 0 {
		t.Fatal("not counted")
	}
}

// Pods outside the mesh that sit on all places of a port that takes plaintext lose some
// to who comes, and keep those that they use.
func TestIdleConnectionsGiveWay(t *testing.T) {
	const places = 20
	r, ca := mesh(t, mode("PERMISSIVE"), limit(func(l *config.ProxyLimits) {
		l.MaxConnections, l.MaxPerSource = places, places/2
	}))
	var idle []net.Conn
	for i := range places {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, byte(2+i%2))}}
		c, err := d.Dial("tcp", r.inbound)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := io.WriteString(c, "GET /denied-or-not HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Read(make([]byte, 4<<10)); err != nil {
			t.Fatal(err)
		}
		idle = append(idle, c)
	}
	first := dialTLS(t, r.inbound, ca.Leaf(t, frontend), "istio-http/1.1")
	first.mustGet(200)
	for range 3 {
		dialTLS(t, r.inbound, ca.Leaf(t, payments), "istio-http/1.1").mustGet(200)
	}
	first.mustGet(200)
	_ = idle[0].SetReadDeadline(time.Now().Add(patience))
	if _, err := io.ReadAll(idle[0]); err != nil && timeout(err) {
		t.Fatal("the oldest idle connection was kept")
	}
}

func timeout(err error) bool {
	n, ok := err.(net.Error) //nolint:errorlint // a plain read's own error
	return ok && n.Timeout()
}
