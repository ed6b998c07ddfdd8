package main

import (
	"net"
	"path/filepath"
	"testing"
	"time"

	"castellan.dev/internal/config"
)

// TestEveryPortIsBounded: nobody takes the server's descriptors and memory by
// opening connections, on whichever port.
func TestEveryPortIsBounded(t *testing.T) {
	cfg := &config.Server{Listen: "127.0.0.1:0", HTTP: "127.0.0.1:0", AdminSocket: filepath.Join(t.TempDir(), "s"),
		Webhook: &config.Webhook{Listen: "127.0.0.1:0"}}
	l, err := listen(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer l.close()
	for name, tt := range map[string]struct {
		listener net.Listener
		limit    int
	}{"listen": {l.grpc, callers.PerSource}, "webhook": {l.webhook, reviewers.PerSource}} {
		go func() {
			for {
				conn, err := tt.listener.Accept()
				if err != nil {
					return
				}
				defer conn.Close()
			}
		}()
		closed := make(chan struct{}, tt.limit+1)
		for range tt.limit + 1 {
			conn, err := net.Dial("tcp", tt.listener.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { conn.Close() })
			go func() {
				_, _ = conn.Read(make([]byte, 1))
				closed <- struct{}{}
			}()
		}
		select {
		case <-closed:
		case <-time.After(30 * time.Second):
			t.Errorf("%s takes more than %d connections of one address", name, tt.limit)
		}
	}
}
