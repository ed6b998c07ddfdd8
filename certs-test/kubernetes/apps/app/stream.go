package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"

	"castellan.dev/certs-test/kubernetes/apps/control"
)

// stream is one TCP connection that stays: every message on it must come back, and when
// it breaks that is a failure and stays one.
type stream struct {
	mu     sync.Mutex
	conn   net.Conn
	broken error
}

func (s *stream) say(ctx context.Context, call control.Call) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.broken != nil {
		return fmt.Errorf("broken before: %w", s.broken)
	}
	if s.conn == nil {
		conn, err := new(net.Dialer).DialContext(ctx, "tcp", call.URL)
		if err != nil {
			return err
		}
		s.conn = conn
	}
	if deadline, ok := ctx.Deadline(); ok {
		_ = s.conn.SetDeadline(deadline)
	}
	s.broken = s.echoed(call.Body)
	return s.broken
}

func (s *stream) echoed(message string) error {
	if message == "" {
		return errors.New("nothing to say")
	}
	if _, err := io.WriteString(s.conn, message); err != nil {
		return err
	}
	back := make([]byte, len(message))
	if _, err := io.ReadFull(s.conn, back); err != nil {
		return err
	}
	if string(back) != message {
		return fmt.Errorf("%q came back as %q", message, back)
	}
	return nil
}

func (s *stream) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conn != nil {
		s.conn.Close()
	}
}
