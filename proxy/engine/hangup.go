package engine

import (
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// hangUpAfter is how long a request is under way before the engine looks whether
// its client is still there.
const hangUpAfter = time.Second

// Sweep ends the HTTP/1 requests whose clients have hung up. Nobody reads from a
// client that waits for its response, so that its end would show at the next byte
// written to it, which may be long in coming. A client that has only ended its own
// direction looks the same, and waits for longer than that in vain; elsewhere,
// it would too (nginx, Envoy, net/http). Tunnels, in which either direction may end
// first, are left alone. Call it about once a second.
func (e *Engine) Sweep() {
	limit := e.cfg.Now().Add(-hangUpAfter)
	for _, c := range e.live() {
		if c.waitsSince(limit) && hungUp(c.conn) {
			c.gone.Store(true)
			c.CloseNow()
		}
	}
}

// waitsSince reports whether a request has been under way since before limit.
func (c *Conn) waitsSince(limit time.Time) bool {
	if c.h2 {
		return false // its reader sees the end
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.active > 0 && !c.closed && !c.tunnel && c.activeAt.Before(limit)
}

// hungUp asks the kernel whether the other side has ended its direction.
func hungUp(conn net.Conn) bool {
	raw := rawConn(conn)
	if raw == nil {
		return false
	}
	gone := false
	err := raw.Control(func(fd uintptr) {
		poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
		n, err := unix.Poll(poll, 0)
		gone = err == nil && n > 0
	})
	return err == nil && gone
}

// socket finds what lies below TLS and the like.
func socket(conn net.Conn) net.Conn {
	for {
		outer, ok := conn.(interface{ NetConn() net.Conn })
		if !ok {
			return conn
		}
		conn = outer.NetConn()
	}
}

// rawConn finds the socket's descriptor; nil when there is none.
func rawConn(conn net.Conn) syscall.RawConn {
	switch conn := socket(conn).(type) {
	case *net.TCPConn:
		return descriptor(conn)
	case *net.UnixConn:
		return descriptor(conn)
	}
	return nil
}

func descriptor(conn syscall.Conn) syscall.RawConn {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil
	}
	return raw
}
