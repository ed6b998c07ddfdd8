package run_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"castellan.dev/internal/run"
)

func TestAdminSocket(t *testing.T) {
	dir, err := os.MkdirTemp("", "st")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	socket := filepath.Join(dir, "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	got := make(chan string, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		data, _ := io.ReadAll(c) // until the end of standard input
		got <- string(data)
		_, _ = c.Write([]byte("answer"))
	}()
	var out bytes.Buffer
	if err := run.AdminSocket(t.Context(), socket, strings.NewReader("question"), &out); err != nil {
		t.Fatal(err)
	}
	if q := <-got; q != "question" || out.String() != "answer" {
		t.Errorf("%q, %q", q, out.String())
	}
}

// TestAdminSocketEnds with the process's context, though standard input never does.
func TestAdminSocketEnds(t *testing.T) {
	dir, err := os.MkdirTemp("", "st")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	in, feed := io.Pipe()
	defer feed.Close()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := run.AdminSocket(ctx, filepath.Join(dir, "s"), in, io.Discard); err != nil && ctx.Err() == nil {
		t.Error(err)
	}
}

func TestAdminSocketIsMissing(t *testing.T) {
	err := run.AdminSocket(t.Context(), filepath.Join(t.TempDir(), "none"), strings.NewReader(""), io.Discard)
	if !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "admin socket: ") {
		t.Error(err)
	}
}
