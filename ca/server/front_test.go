package server_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	istiov1 "istio.io/api/security/v1alpha1"

	castellanv1 "castellan.dev/api/castellan/v1"
)

// rawCodec sends bytes as they are.
type rawCodec struct{}

func (rawCodec) Marshal(v any) ([]byte, error)   { return *(v.(*[]byte)), nil }
func (rawCodec) Unmarshal(b []byte, v any) error { *(v.(*[]byte)) = bytes.Clone(b); return nil }
func (rawCodec) Name() string                    { return "proto" }

// TestGateIsBeforeTheDecoder: what a caller without an agent's certificate sends to
// a gated method is not decoded. A message that is no message shows it: decoded, it
// would be an internal error.
func TestGateIsBeforeTheDecoder(t *testing.T) {
	w := newWorld(t, options{})
	garbage := bytes.Repeat([]byte{0xff}, 64)
	call := func(conn *grpc.ClientConn, method string) codes.Code {
		t.Helper()
		var out []byte
		return status.Code(conn.Invoke(t.Context(), method, &garbage, &out, grpc.ForceCodec(rawCodec{})))
	}
	if code := call(w.conn, castellanv1.Node_Report_FullMethodName); code != codes.Unauthenticated {
		t.Errorf("without a certificate: %v", code)
	}
	if code := call(w.dial(w.certificate(t, w.token(orders()), w.agentToken, 600)), castellanv1.Node_Report_FullMethodName); code != codes.PermissionDenied {
		t.Errorf("with a workload's: %v", code)
	}
	if code := call(w.dial(w.certificate(t, w.agentToken, w.agentToken, 600)), castellanv1.Node_Report_FullMethodName); code != codes.Internal {
		t.Errorf("an agent's message is decoded, but: %v", code)
	}
	if code := call(w.conn, istiov1.IstioCertificateService_CreateCertificate_FullMethodName); code != codes.Internal {
		t.Errorf("an open method's message is decoded, but: %v", code)
	}
}

// TestMessageBounds: an agent may send megabytes, anybody else what requests need.
func TestMessageBounds(t *testing.T) {
	w := newWorld(t, options{})
	report := &castellanv1.ReportRequest{Node: strings.Repeat("n", 3<<20)}
	if _, err := castellanv1.NewNodeClient(w.dial(w.certificate(t, w.agentToken, w.agentToken, 600))).Report(t.Context(), report); status.Code(err) != codes.Unimplemented {
		t.Errorf("an agent: %v", err)
	}
	if _, err := castellanv1.NewNodeClient(w.conn).Report(t.Context(), report); status.Code(err) != codes.Unauthenticated {
		t.Errorf("anybody: %v", err)
	}
	_, err := w.create(t.Context(), &istiov1.IstioCertificateRequest{Csr: strings.Repeat("A", 1<<20)})
	if status.Code(err) != codes.ResourceExhausted {
		t.Errorf("a megabyte to an open method: %v", err)
	}
	if r := w.log.take(t); len(r) == 0 || r[len(r)-1]["reason"] != "message-size" {
		t.Errorf("log %v", r)
	}
}

// heldCalls opens n calls on one connection, each announcing a message and sending
// half of it. What comes of each is sent on the channel.
func heldCalls(t *testing.T, address string, n int) <-chan string {
	t.Helper()
	transport := &http2.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}}}
	t.Cleanup(transport.CloseIdleConnections)
	answers := make(chan string, n)
	for range n {
		body, writer := io.Pipe()
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "https://"+address+istiov1.IstioCertificateService_CreateCertificate_FullMethodName, body)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", "application/grpc")
		req.Header.Set("Te", "trailers")
		go func() {
			head := binary.BigEndian.AppendUint32([]byte{0}, 32<<10)
			_, _ = writer.Write(append(head, make([]byte, 16<<10)...))
		}()
		go func() {
			defer writer.Close()
			resp, err := transport.RoundTrip(req)
			if err != nil {
				answers <- err.Error()
				return
			}
			_, _ = io.Copy(io.Discard, resp.Body)
			_ = resp.Body.Close()
			code := resp.Header.Get("Grpc-Status")
			if code == "" {
				code = resp.Trailer.Get("Grpc-Status")
			}
			answers <- code
		}()
	}
	return answers
}

// TestHeldMessagesAreLetGo: a call whose message never ends arriving ends.
func TestHeldMessagesAreLetGo(t *testing.T) {
	w := newWorld(t, options{timeout: 300 * time.Millisecond})
	answers := heldCalls(t, w.address, 20)
	for range 20 {
		select {
		case got := <-answers:
			if got != fmt.Sprint(int(codes.DeadlineExceeded)) {
				t.Errorf("answer %q, want DeadlineExceeded", got)
			}
		case <-time.After(30 * time.Second):
			t.Fatal("the server still waits for the rest of a message")
		}
	}
}

// TestUnprovedCallsAreCounted: one source has so many calls under way and no more, and
// whoever means it gets his answer all the same.
func TestUnprovedCallsAreCounted(t *testing.T) {
	w := newWorld(t, options{timeout: time.Minute})
	release := w.gate.SetUnproved(8, 4)
	defer release()
	answers := heldCalls(t, w.address, 6)
	drivenOut := func(n int) { // gRPC answers so, as the call's context has ended
		t.Helper()
		for range n {
			select {
			case got := <-answers:
				if got != fmt.Sprint(int(codes.Canceled)) {
					t.Errorf("answer %q, want Canceled", got)
				}
			case <-time.After(30 * time.Second):
				t.Fatal("calls without a proof are not counted")
			}
		}
	}
	drivenOut(2)
	request, _ := csr(t)
	for range 4 {
		if _, err := w.create(as(t.Context(), w.token(orders()), w.agentToken), &istiov1.IstioCertificateRequest{Csr: request}); err != nil {
			t.Errorf("the source is full: %v", err)
		}
	}
	drivenOut(1) // they left the place that the first of them took
	// Over an agent's connection no such place is needed, and nobody loses his.
	agent := w.certificate(t, w.agentToken, w.agentToken, 600)
	held := heldCalls(t, w.address, 1)
	client := istiov1.NewIstioCertificateServiceClient(w.dial(agent))
	for range 4 {
		if _, err := client.CreateCertificate(as(t.Context(), w.token(orders()), w.agentToken), &istiov1.IstioCertificateRequest{Csr: request}); err != nil {
			t.Error(err)
		}
	}
	select {
	case got := <-answers:
		t.Errorf("driven out by an agent: %s", got)
	case got := <-held:
		t.Errorf("driven out by an agent: %s", got)
	default:
	}
}

// TestProvedCallersGiveTheirSlotBack: issuing for one does not keep others waiting.
func TestProvedCallersGiveTheirSlotBack(t *testing.T) {
	w := newWorld(t, options{})
	defer w.gate.SetUnproved(1, 1)()
	request, _ := csr(t)
	for range 3 {
		if _, err := w.create(as(t.Context(), w.token(orders()), w.agentToken), &istiov1.IstioCertificateRequest{Csr: request}); err != nil {
			t.Fatal(err)
		}
	}
}

// TestRefusalsDoNotFillTheDisk: metrics count every refusal, the log a few.
func TestRefusalsDoNotFillTheDisk(t *testing.T) {
	now := time.Now()
	w := newWorld(t, options{now: func() time.Time { return now }})
	request, _ := csr(t)
	const calls = 200
	for range calls {
		_, err := w.create(as(t.Context(), "garbage", w.agentToken), &istiov1.IstioCertificateRequest{Csr: request})
		if status.Code(err) != codes.Unauthenticated {
			t.Fatal(err)
		}
		if _, err := castellanv1.NewNodeClient(w.conn).Report(t.Context(), &castellanv1.ReportRequest{}); status.Code(err) != codes.Unauthenticated {
			t.Fatal(err)
		}
	}
	byText := map[any]int{}
	for _, r := range w.log.take(t) {
		byText[r["msg"]]++
	}
	if byText["identity refused"] != 50 || byText["call refused"] != 50 {
		t.Errorf("log lines %v, want 50 of each", byText)
	}
	for name, want := range map[string]float64{
		"castellan_server_identity_refusals_total":       calls,
		"castellan_server_identity_log_suppressed_total": calls - 50,
		"castellan_server_gate_refusals_total":           calls,
		"castellan_server_gate_log_suppressed_total":     calls - 50,
	} {
		if got := w.counted(t, name); got != want {
			t.Errorf("%s is %v, want %v", name, got, want)
		}
	}
	// Another reason is told at once, and so is the first after the pause.
	_, _ = w.create(t.Context(), &istiov1.IstioCertificateRequest{Csr: request})
	if r := w.log.take(t); len(r) != 1 || r[0]["reason"] != "no-token" {
		t.Errorf("log %v", r)
	}
	now = now.Add(time.Minute)
	_, _ = w.create(as(t.Context(), "garbage", w.agentToken), &istiov1.IstioCertificateRequest{Csr: request})
	if r := w.log.take(t); len(r) != 1 || r[0]["suppressed"] != float64(150) {
		t.Errorf("log %v", r)
	}
}

// counted is the sum of a counter over its labels.
func (w *world) counted(t *testing.T, name string) (sum float64) {
	t.Helper()
	families, err := w.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == name {
			for _, m := range f.GetMetric() {
				sum += m.GetCounter().GetValue()
			}
		}
	}
	return sum
}

// TestAgentsAreNotCrowdedOut: connections of anybody drive out each other, and never
// an agent's.
func TestAgentsAreNotCrowdedOut(t *testing.T) {
	w := newWorld(t, options{callers: 2})
	var dialled atomic.Int32
	agent := healthv1.NewHealthClient(w.dial(w.certificate(t, w.agentToken, w.agentToken, 600),
		grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
			dialled.Add(1)
			return new(net.Dialer).DialContext(ctx, "tcp", address)
		})))
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if _, err := agent.Check(ctx, &healthv1.HealthCheckRequest{}); err != nil {
		t.Fatal(err)
	}
	crowding := make(chan error, 4)
	for range cap(crowding) {
		conn, err := tls.Dial("tcp", w.address, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		go func() { _, err := io.Copy(io.Discard, conn); crowding <- err }()
	}
	for range 2 { // the oldest of the four
		<-crowding
	}
	if _, err := agent.Check(ctx, &healthv1.HealthCheckRequest{}); err != nil || dialled.Load() != 1 {
		t.Errorf("%v, over %d connections", err, dialled.Load())
	}
}
