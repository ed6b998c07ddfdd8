package crowd_test

import (
	"errors"
	"net"
	"os"
	"testing"
	"testing/synctest"
	"time"

	"castellan.dev/internal/crowd"
)

// Nothing is read from who reads nothing, until he does.
func TestPaced(t *testing.T) {
	client, raw := net.Pipe() // without any buffer
	defer client.Close()
	began := &beginning{Conn: raw, began: make(chan struct{})}
	server := crowd.Paced(began)
	defer server.Close()
	wrote := make(chan error, 1)
	go func() { _, err := server.Write([]byte("answer")); wrote <- err }()
	<-began.began
	read := make(chan string, 1)
	go func() {
		b := make([]byte, 16)
		n, _ := server.Read(b)
		read <- string(b[:n])
	}()
	// What nobody takes cannot be written to a pipe.
	if err := client.SetWriteDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if _, err := client.Write([]byte("again")); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("taken from who reads nothing: %v", err)
	}
	if n, err := client.Read(make([]byte, 16)); n != 6 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	if err := <-wrote; err != nil {
		t.Error(err)
	}
	if err := client.SetWriteDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := client.Write([]byte("again")); err != nil {
		t.Error(err)
	}
	if got := <-read; got != "again" {
		t.Errorf("%q", got)
	}
}

// beginning says when something begins to be written.
type beginning struct {
	net.Conn
	began chan struct{}
}

func (b *beginning) Write(p []byte) (int, error) {
	close(b.began)
	return b.Conn.Write(p)
}

// A peer that reads nothing for long loses the connection, even where deadlines were
// lifted meanwhile; what was read in time has no deadline.
func TestPacedEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, raw := net.Pipe()
		defer client.Close()
		server := crowd.Paced(raw)
		defer server.Close()
		for range 3 {
			go func() { time.Sleep(unreadFor / 2); _, _ = client.Read(make([]byte, 16)) }()
			if _, err := server.Write([]byte("answer")); err != nil {
				t.Error(err)
			}
			time.Sleep(2 * unreadFor)
		}
		began := time.Now()
		if _, err := server.Write([]byte("answer")); !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(began) != unreadFor {
			t.Errorf("%v after %s", err, time.Since(began))
		}
	})
}

const unreadFor = 10 * time.Second
