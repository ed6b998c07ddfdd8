package cli

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"time"

	"castellan.dev/proxy/engine"
)

// wire returns the request as its bytes.
func (e *env) wire(q *canI, host string) ([]byte, error) {
	pairs, err := parsePairs("--header", q.headers)
	if err != nil {
		return nil, err
	}
	if q.jwtFile != "" {
		token, err := e.readToken(q.jwtFile)
		if err != nil {
			return nil, err
		}
		if strings.ContainsAny(token, "\r\n") {
			// Not shown: what is in the file may be a token all the same.
			return nil, invalidf("--jwt %s holds several lines; a token is one", q.jwtFile)
		}
		pairs = append(pairs, [2]string{"Authorization", "Bearer " + token})
	}
	var b strings.Builder
	line := func(parts ...string) error {
		for _, p := range parts {
			if strings.ContainsAny(p, "\r\n") {
				return invalidf("%q holds a line break, which would end the line it stands in", p)
			}
			b.WriteString(p)
		}
		b.WriteString("\r\n")
		return nil
	}
	lines := [][]string{{q.method, " ", q.target, " HTTP/1.1"}, {"Host: ", host}}
	for _, p := range pairs {
		if strings.EqualFold(p[0], "host") {
			return nil, invalidf("--header %q: use --host", p[0])
		}
		lines = append(lines, []string{p[0], ": ", p[1]})
	}
	for _, l := range append(lines, []string{"Connection: close"}, nil) {
		if err := line(l...); err != nil {
			return nil, err
		}
	}
	return []byte(b.String()), nil
}

// judgedSession judges the one request and forwards nothing.
type judgedSession struct {
	judge func(*engine.Request)
	begun bool
	// malformed is what the engine has against a request that it does not put up for judgement.
	malformed string
}

// Begin judges.
func (s *judgedSession) Begin(r *engine.Request) engine.Verdict {
	s.begun = true
	s.judge(r)
	return engine.Verdict{Status: http.StatusNoContent}
}

// Dial is never asked: nothing is forwarded.
func (s *judgedSession) Dial(context.Context, *engine.Request) (net.Conn, error) {
	return nil, errors.New("nothing is forwarded")
}

// End learns why a request was not put up for judgement.
func (s *judgedSession) End(_ *engine.Request, o *engine.Outcome) {
	if s.begun {
		return
	}
	s.malformed = o.Reason
	if o.Err != nil {
		s.malformed = o.Err.Error()
	}
}

// throughEngine gives the bytes of one request to the proxy's HTTP engine and
// returns the status it answers with.
func throughEngine(raw []byte, s *judgedSession) (int, error) {
	client, server := net.Pipe()
	defer client.Close()
	deadline := time.Now().Add(fetchTimeout) //nolint:forbidigo // bounds a pipe within this process
	if err := client.SetDeadline(deadline); err != nil {
		return 0, err
	}
	e := engine.New(engine.Config{})
	done := make(chan struct{})
	go func() {
		defer close(done)
		e.ServeConn(context.Background(), server, false, s)
	}()
	wrote := make(chan struct{})
	go func() {
		defer close(wrote)
		// The engine may answer before it has read everything.
		_, _ = client.Write(raw)
	}()
	resp, err := http.ReadResponse(bufio.NewReader(client), nil)
	client.Close()
	<-wrote
	<-done
	e.Close()
	if err != nil {
		return 0, fmt.Errorf("the proxy's engine did not answer: %w", err)
	}
	resp.Body.Close()
	return resp.StatusCode, nil
}
