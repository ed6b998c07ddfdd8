package proxy

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"time"

	"castellan.dev/internal/judge"
)

// What a port speaks, under the names of this package.
type protocol = judge.Protocol

const (
	undeclared  = judge.Undeclared
	speaksHTTP  = judge.HTTP
	speaksHTTP2 = judge.HTTP2
	speaksTCP   = judge.TCP
	// speaksTLS is what a connection turns out to begin with, and no port declares.
	speaksTLS protocol = 0xff
)

// preface opens every HTTP/2 connection (RFC 9113 section 3.4).
const preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

// sniffLength is how many bytes are looked at to tell what is spoken.
const sniffLength = 64

// prefixConn is a connection whose first bytes have been read already.
type prefixConn struct {
	net.Conn
	prefix [sniffLength]byte
	read   int
	length int
	// late: the client had said too little to tell what it speaks when its time
	// was up. It counts as TCP, on which the server may speak first, and what the
	// client says then must not turn out to be HTTP.
	late bool
	// mayBeTLS: what the client says first may be a ClientHello to us.
	mayBeTLS bool
}

// errLate: HTTP on a connection that had been taken for TCP, which nobody has
// judged, nor cleaned of the headers that only we may set.
var errLate = errors.New("http after the time to tell had passed")

// Read gives the bytes read ahead, and then the connection's own.
func (c *prefixConn) Read(b []byte) (int, error) {
	if c.late {
		if err := c.fill(func(b []byte) bool { return sniff(b) != sniffedNothing }, time.Time{}); err != nil {
			return 0, err
		}
		if what := sniff(c.prefix[:c.length]); what == sniffedHTTP1 || what == sniffedHTTP2 {
			return 0, errLate
		}
		c.late = false
	}
	if c.read < c.length {
		n := copy(b, c.prefix[c.read:c.length])
		c.read += n
		return n, nil
	}
	return c.Conn.Read(b)
}

// NetConn returns the connection underneath.
func (c *prefixConn) NetConn() net.Conn { return c.Conn }

// CloseWrite ends our direction.
func (c *prefixConn) CloseWrite() error { return closeWrite(c.Conn) }

// fill reads until enough is there to tell, or there is no more.
func (c *prefixConn) fill(enough func([]byte) bool, deadline time.Time) error {
	if err := c.SetReadDeadline(deadline); err != nil {
		return err
	}
	for c.length < len(c.prefix) && !enough(c.prefix[:c.length]) {
		n, err := c.Conn.Read(c.prefix[c.length:])
		c.length += n
		if err != nil && (c.length == 0 || !errors.Is(err, io.EOF)) {
			return err
		}
		if err != nil {
			break
		}
	}
	return c.SetReadDeadline(time.Time{})
}

// sniffed is what the first bytes of a connection tell.
type sniffed uint8

const (
	sniffedNothing sniffed = iota // more bytes are needed
	sniffedHTTP1
	sniffedHTTP2
	sniffedOther
)

// sniff tells HTTP by its shape: HTTP/2 by its preface, HTTP/1 by a token, space
// and how a target begins, in whatever spelling an application might take for
// HTTP: what is HTTP here has to pass the strict parser, which answers 400 to all
// but the right one. What an application makes of stranger openings than these is
// its own; rules about HTTP fail closed on TCP (authz 19).
func sniff(b []byte) sniffed {
	what := sniffStart(b)
	if what == sniffedNothing && len(b) >= sniffLength {
		return sniffedHTTP1 // nothing so far says that it is none
	}
	return what
}

func sniffStart(b []byte) sniffed {
	if len(b) > 0 && len(b) <= len(preface) && preface[:len(b)] == string(b) {
		if len(b) == len(preface) {
			return sniffedHTTP2
		}
		return sniffedNothing
	}
	if len(b) >= len(preface) && string(b[:len(preface)]) == preface {
		return sniffedHTTP2
	}
	rest := bytes.TrimLeft(b, blank)
	method := 0
	for method < len(rest) && isToken(rest[method]) {
		method++
	}
	target := bytes.TrimLeft(rest[method:], " \t")
	switch {
	case method == 0 && len(rest) > 0:
		return sniffedOther
	case len(target) == 0:
		return sniffedNothing
	case len(target) == len(rest)-method:
		return sniffedOther // nothing between method and target
	}
	return sniffTarget(target)
}

// blank is what may stand before a request line, for a tolerant reader (RFC 9112
// section 2.2, and what some take for space).
const blank = "\r\n \t\v\f"

// sniffTarget tells by how the target begins: origin, asterisk or absolute form.
func sniffTarget(b []byte) sniffed {
	switch b[0] {
	case '/':
		return sniffedHTTP1
	case '*':
		return sniffPrefix(bytes.TrimLeft(b[1:], " \t"), "http/")
	}
	return sniffPrefix(b, "http")
}

// sniffPrefix: HTTP if b begins with the prefix, in whatever case.
func sniffPrefix(b []byte, prefix string) sniffed {
	n := min(len(b), len(prefix))
	switch {
	case !strings.EqualFold(string(b[:n]), prefix[:n]):
		return sniffedOther
	case n < len(prefix):
		return sniffedNothing
	}
	return sniffedHTTP1
}

// isToken tells a character of a method (RFC 9110 section 5.6.2).
func isToken(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || strings.IndexByte("!#$%&'*+-.^_`|~", c) >= 0
}

// recordHandshake is the first byte of a TLS ClientHello (RFC 8446 section 5.1).
const recordHandshake = 0x16

// isPreface reports whether the connection begins as HTTP/2 does; enough bytes
// to be sure have been read.
func isPreface(b []byte) (yes, sure bool) {
	n := min(len(b), len(preface))
	if string(b[:n]) != preface[:n] {
		return false, true
	}
	return n == len(preface), n == len(preface)
}

func timedOut(err error) bool { return errors.Is(err, os.ErrDeadlineExceeded) }

// halfCloser can end one direction of a connection.
type halfCloser interface{ CloseWrite() error }

func closeWrite(c net.Conn) error {
	if h, ok := c.(halfCloser); ok {
		return h.CloseWrite()
	}
	return c.Close()
}
