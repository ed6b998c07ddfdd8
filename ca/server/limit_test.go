package server_test

import (
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	istiov1 "istio.io/api/security/v1alpha1"

	castellanv1 "castellan.dev/api/castellan/v1"
	"castellan.dev/ca/server"
	"castellan.dev/internal/jws/jwstest"
)

func TestRateLimits(t *testing.T) {
	second := orders()
	second.UID, second.Name = "pod-orders-2", "orders-2"
	tests := map[string]struct {
		limits server.Limits
		pods   []jwstest.Pod // in turn
		passes int
		reason string
		wait   time.Duration
	}{
		"per attested pod":              {server.Limits{PodBurst: 3, PodPerSecond: 0.01}, []jwstest.Pod{orders()}, 3, "limit-pod", 100 * time.Second},
		"another pod is another bucket": {server.Limits{PodBurst: 2, PodPerSecond: 0.01}, []jwstest.Pod{orders(), second}, 4, "limit-pod", 100 * time.Second},
		"overall":                       {server.Limits{PodBurst: 100, PodPerSecond: 10, TotalBurst: 4, TotalPerSecond: 0.1}, []jwstest.Pod{orders(), second}, 4, "limit-total", 10 * time.Second},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, options{limits: tt.limits})
			w.setPods(orders(), second)
			request, _ := csr(t)
			for i := range tt.passes {
				if _, err := w.create(as(t.Context(), w.token(tt.pods[i%len(tt.pods)]), w.agentToken), &istiov1.IstioCertificateRequest{Csr: request}); err != nil {
					t.Fatalf("request %d: %v", i, err)
				}
			}
			w.log.take(t)
			rows := w.rows(t)
			_, err := w.create(as(t.Context(), w.token(tt.pods[0]), w.agentToken), &istiov1.IstioCertificateRequest{Csr: request})
			st := status.Convert(err)
			if st.Code() != codes.ResourceExhausted || st.Message() != "too many requests, retry later" {
				t.Fatal(err)
			}
			if len(st.Details()) != 1 {
				t.Fatalf("details %v", st.Details())
			}
			retry, ok := st.Details()[0].(*errdetails.RetryInfo)
			if got := retry.GetRetryDelay().AsDuration(); !ok || got <= 0 || got > tt.wait {
				t.Fatalf("retry hint %v, want up to %v", got, tt.wait)
			}
			if r := w.log.take(t); len(r) != 1 || r[0]["reason"] != tt.reason {
				t.Errorf("log %v", r)
			}
			if w.rows(t) != rows {
				t.Error("a ledger row came of a refusal")
			}
			// A pod's tokens have a bucket of their own; the overall one is for all.
			want := codes.OK
			if tt.reason == "limit-total" {
				want = codes.ResourceExhausted
			}
			if _, err := w.mint(as(t.Context(), w.token(tt.pods[0]), w.agentToken), &castellanv1.MintJWTRequest{Audience: []string{"x"}}); status.Code(err) != want {
				t.Errorf("MintJWT: %v", err)
			}
		})
	}
}
