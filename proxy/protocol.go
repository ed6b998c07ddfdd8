package proxy

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"time"
)

// protocol is what is spoken inside a connection.
type protocol uint8

const (
	// undeclared is told apart by its first bytes.
	undeclared protocol = iota
	speaksHTTP
	// speaksHTTP2 is gRPC and declared HTTP/2: the application is spoken to with HTTP/2.
	speaksHTTP2
	speaksTCP
)

// protocolOf reads a declared protocol. What is not HTTP in the clear is opaque bytes.
func protocolOf(declared string) protocol {
	switch declared {
	case "":
		return undeclared
	case "http", "http1", "http/1.1":
		return speaksHTTP
	case "http2", "h2c", "grpc", "grpc-web":
		return speaksHTTP2
	default:
		return speaksTCP
	}
}

// preface opens every HTTP/2 connection (RFC 9113 section 3.4).
const preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

// prefixConn is a connection whose first bytes have been read already.
type prefixConn struct {
	net.Conn
	prefix [len(preface)]byte
	read   int
	length int
}

// Read gives the bytes read ahead, and then the connection's own.
func (c *prefixConn) Read(b []byte) (int, error) {
	if c.read < c.length {
		n := copy(b, c.prefix[c.read:c.length])
		c.read += n
		return n, nil
	}
	return c.Conn.Read(b)
}

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

// maxMethod is the longest method that is taken for one.
const maxMethod = 20

// sniff tells HTTP by its shape: HTTP/2 by its preface, HTTP/1 by a method, a
// space and how a target begins. Whoever disguises HTTP as something else gains
// nothing: rules about HTTP fail closed on TCP (authz 19).
func sniff(b []byte) sniffed {
	if len(b) == 0 {
		return sniffedNothing
	}
	if len(b) <= len(preface) && preface[:len(b)] == string(b) {
		if len(b) == len(preface) {
			return sniffedHTTP2
		}
		return sniffedNothing
	}
	i := bytes.IndexByte(b, ' ')
	method := b
	if i >= 0 {
		method = b[:i]
	}
	for _, c := range method {
		if c < 'A' || c > 'Z' {
			return sniffedOther
		}
	}
	switch {
	case len(method) == 0 || len(method) > maxMethod:
		return sniffedOther
	case i < 0 || i+1 == len(b):
		return sniffedNothing
	case bytes.IndexByte([]byte("/*hH"), b[i+1]) < 0: // origin, asterisk or absolute form
		return sniffedOther
	}
	return sniffedHTTP1
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
