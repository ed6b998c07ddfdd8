package main

import (
	"errors"
	"net"
	"testing"
	"time"

	"castellan.dev/ca/server"
)

// TestOneSourceGetsItsShare: connections over a source's share are closed, and a
// closed one makes room.
func TestOneSourceGetsItsShare(t *testing.T) {
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := limitSources(inner, 2)
	accepted := make(chan net.Conn)
	go func() {
		defer close(accepted)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			accepted <- conn
		}
	}()
	defer func() {
		_ = l.Close()
		for conn := range accepted {
			_ = conn.Close()
		}
	}()
	dial := func(from string) net.Conn {
		t.Helper()
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
		conn, err := d.Dial("tcp", inner.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		return conn
	}
	dial("127.0.0.1")
	first := <-accepted
	dial("127.0.0.1")
	<-accepted
	over := dial("127.0.0.1")
	if err := over.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := over.Read(make([]byte, 1)); err == nil || isTimeout(err) {
		t.Fatalf("the third connection of a source is kept: %v", err)
	}
	dial("127.0.0.2")
	<-accepted // another source is served meanwhile
	_ = first.Close()
	_ = first.Close() // counts once
	dial("127.0.0.1")
	<-accepted
	if l.enter(server.Source("127.0.0.1:1")) {
		t.Error("closing twice made room for two")
	}
}

func isTimeout(err error) bool {
	var ne net.Error
	return errors.As(err, &ne) && ne.Timeout()
}
