package engine

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"testing"
)

// nowhere sends each request to another upstream, which cannot be reached.
type nowhere struct {
	n  int
	h2 bool
}

func (s *nowhere) Begin(*Request) Verdict {
	s.n++
	return Verdict{Upstream: Upstream{Key: fmt.Sprint("10.0.0.1:", s.n), H2: s.h2}}
}
func (s *nowhere) Dial(context.Context, *Request) (net.Conn, error) {
	return nil, errors.New("refused")
}
func (s *nowhere) End(*Request, *Outcome) {}

// What is kept of upstreams is kept of those that were reached: their number is
// not for whoever sends requests to choose.
func TestUnreachedUpstreamsAreForgotten(t *testing.T) {
	for name, h2 := range map[string]bool{"http/1": false, "http/2": true} {
		t.Run(name, func(t *testing.T) {
			e := New(Config{})
			client, server := net.Pipe()
			done := make(chan struct{})
			go func() { defer close(done); e.ServeConn(context.Background(), server, false, &nowhere{h2: h2}) }()
			answers := bufio.NewReader(client)
			for range 100 {
				if _, err := io.WriteString(client, "GET / HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
					t.Fatal(err)
				}
				resp, err := http.ReadResponse(answers, nil)
				if err != nil || resp.StatusCode != 503 {
					t.Fatalf("%v %v", resp, err)
				}
				if _, err := io.Copy(io.Discard, resp.Body); err != nil {
					t.Fatal(err)
				}
			}
			client.Close()
			<-done
			if n := len(e.upstreams.keys) + len(e.h2.keys); n > 1 {
				t.Errorf("%d upstreams are remembered", n)
			}
			e.Close()
		})
	}
}
