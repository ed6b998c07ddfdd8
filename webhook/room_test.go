package webhook_test

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"castellan.dev/internal/config"
	"castellan.dev/webhook"
)

// TestRoomForWhoHoldsLess: addresses that announce large reviews and send them
// slowly keep nobody else out.
func TestRoomForWhoHoldsLess(t *testing.T) {
	handler, _ := webhook.HandlerWithBudget(newInjector(t, config.Inject{}))
	arrived := make(chan struct{}, 16)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.ContentLength > 1<<20 {
			arrived <- struct{}{}
		}
		handler.ServeHTTP(w, r)
	}))
	defer server.Close()
	for i := range 9 { // 63 MiB, of three addresses
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, byte(2+i%3))}}
		conn, err := d.Dial("tcp", server.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n ", webhook.InjectPath, 7<<20)
		<-arrived
	}
	client := &http.Client{Timeout: time.Minute}
	defer client.CloseIdleConnections()
	for range 3 {
		began := time.Now()
		resp, err := client.Post(server.URL+webhook.InjectPath, "application/json", strings.NewReader("{}"))
		if err != nil {
			t.Fatal(err)
		}
		text, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode != http.StatusBadRequest || time.Since(began) > 4*time.Second {
			t.Errorf("%d %s after %v", resp.StatusCode, text, time.Since(began))
		}
	}
}
