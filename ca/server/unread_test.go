package server_test

import (
	"bytes"
	"crypto/tls"
	"net"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	istiov1 "istio.io/api/security/v1alpha1"
)

// TestWhoReadsNothing: calls that are begun and given up again, by somebody without a
// certificate who reads no answer, leave nothing behind; of methods that there are not
// nothing is taken in at all.
func TestWhoReadsNothing(t *testing.T) {
	for name, method := range map[string]string{
		"a method": istiov1.IstioCertificateService_CreateCertificate_FullMethodName,
		// Its name, where it were said back, would fill what the kernel keeps.
		"none": "/" + strings.Repeat("x", 12000) + "/Z",
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, options{discard: true, callers: 10})
			raw, err := net.Dial("tcp", w.address)
			if err != nil {
				t.Fatal(err)
			}
			defer raw.Close()
			_ = raw.(*net.TCPConn).SetReadBuffer(4 << 10)
			conn := tls.Client(raw, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
			if err := conn.Handshake(); err != nil {
				t.Fatal(err)
			}
			if err := conn.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
				t.Fatal(err)
			}
			before := alive()
			begun := giveUp(conn, method, 4000)
			// 4,000 calls with what a window takes would be 250 MiB. What is let in before
			// the server stops reading is little.
			if grown := alive() - before; grown > 64<<20 {
				t.Errorf("%d calls leave %d MiB", begun, grown>>20)
			}
		})
	}
}

// giveUp begins calls, sends 64,000 bytes of each and gives it up, until the connection
// takes no more, and returns how many.
func giveUp(conn net.Conn, method string, n int) int {
	var head bytes.Buffer
	e := hpack.NewEncoder(&head)
	e.SetMaxDynamicTableSize(0)
	for _, kv := range [][2]string{
		{":method", "POST"}, {":scheme", "https"}, {":path", method}, {":authority", "x"}, {"content-type", "application/grpc"}, {"te", "trailers"},
	} {
		_ = e.WriteField(hpack.HeaderField{Name: kv[0], Value: kv[1]})
	}
	framer := http2.NewFramer(conn, conn)
	if _, err := conn.Write([]byte(http2.ClientPreface)); err != nil || framer.WriteSettings() != nil {
		return 0
	}
	// The first announces a message; what the windows do not allow ends the connection,
	// which is as good.
	frame := make([]byte, 16000)
	frame[1] = 1
	for i := range n {
		id := uint32(2*i + 1)
		if framer.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: head.Bytes(), EndHeaders: true}) != nil {
			return i
		}
		for range 4 {
			if framer.WriteData(id, false, frame) != nil {
				return i
			}
		}
		if framer.WriteRSTStream(id, http2.ErrCodeCancel) != nil {
			return i
		}
	}
	return n
}

// alive is the memory in use.
func alive() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc + m.StackInuse)
}
