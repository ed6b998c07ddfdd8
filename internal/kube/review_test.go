package kube_test

import (
	"errors"
	"strings"
	"testing"

	authenticationv1 "k8s.io/api/authentication/v1"
	"k8s.io/apimachinery/pkg/runtime"
	k8stesting "k8s.io/client-go/testing"

	"castellan.dev/ca/attest"
	"castellan.dev/internal/kube"
)

// A review is attestation's, field for field.
var _ = attest.Review(kube.Review{})

func TestReview(t *testing.T) {
	whole := func() authenticationv1.TokenReviewStatus {
		return authenticationv1.TokenReviewStatus{
			Authenticated: true, Audiences: []string{"castellan.dev"},
			User: authenticationv1.UserInfo{
				Username: "system:serviceaccount:shop:orders", UID: "sa",
				Extra: map[string]authenticationv1.ExtraValue{
					"authentication.kubernetes.io/pod-name": {"orders-1"}, "authentication.kubernetes.io/pod-uid": {"pod"},
					"authentication.kubernetes.io/node-name": {"node-a"}, "authentication.kubernetes.io/node-uid": {"n"},
					"authentication.kubernetes.io/credential-id": {"JTI=x"},
				},
			},
		}
	}
	for name, tt := range map[string]struct {
		change func(*authenticationv1.TokenReviewStatus)
		want   func(*kube.Review)
		text   string
	}{
		"whole": {nil, func(*kube.Review) {}, ""},
		"not authenticated": {func(s *authenticationv1.TokenReviewStatus) {
			s.Authenticated, s.Error = false, "[invalid bearer token]"
		}, nil, "refuses the token: [invalid bearer token]"},
		"a long error": {func(s *authenticationv1.TokenReviewStatus) {
			s.Authenticated, s.Error = false, strings.Repeat("x", 1000)
		}, nil, strings.Repeat("x", 256)},
		"a user":          {func(s *authenticationv1.TokenReviewStatus) { s.User.Username = "alice" }, nil, "not of a service account"},
		"half an account": {func(s *authenticationv1.TokenReviewStatus) { s.User.Username = "system:serviceaccount:shop" }, nil, "not of a service account"},
		"no pod": {func(s *authenticationv1.TokenReviewStatus) {
			delete(s.User.Extra, "authentication.kubernetes.io/pod-name")
			delete(s.User.Extra, "authentication.kubernetes.io/pod-uid")
		}, func(r *kube.Review) { r.PodName, r.PodUID = "", "" }, ""},
		"two nodes": {func(s *authenticationv1.TokenReviewStatus) {
			s.User.Extra["authentication.kubernetes.io/node-name"] = authenticationv1.ExtraValue{"node-a", "node-b"}
		}, func(r *kube.Review) { r.Node = "" }, ""},
		"no audience": {func(s *authenticationv1.TokenReviewStatus) { s.Audiences = nil }, func(r *kube.Review) { r.Audiences = nil }, ""},
	} {
		t.Run(name, func(t *testing.T) {
			c := newCluster(t)
			status := whole()
			if tt.change != nil {
				tt.change(&status)
			}
			var asked *authenticationv1.TokenReview
			c.PrependReactor("create", "tokenreviews", func(a k8stesting.Action) (bool, runtime.Object, error) {
				asked = a.(k8stesting.CreateAction).GetObject().(*authenticationv1.TokenReview)
				return true, &authenticationv1.TokenReview{Status: status}, nil
			})
			got, err := kube.NewReviewer(c.client()).Review(t.Context(), "TOKEN", []string{"castellan.dev", "istio-ca"})
			if asked.Spec.Token != "TOKEN" || len(asked.Spec.Audiences) != 2 {
				t.Errorf("asked %+v", asked.Spec)
			}
			if tt.text != "" {
				if !errors.Is(err, kube.ErrTokenRefused) || !strings.Contains(err.Error(), tt.text) || len(err.Error()) > 400 {
					t.Fatal(err)
				}
				return
			}
			want := kube.Review{Namespace: "shop", Account: "orders", AccountUID: "sa", PodName: "orders-1", PodUID: "pod", Node: "node-a", NodeUID: "n", Audiences: []string{"castellan.dev"}}
			tt.want(&want)
			if err != nil || got.PodName != want.PodName || got.PodUID != want.PodUID || got.Node != want.Node || got.NodeUID != want.NodeUID ||
				got.Namespace != want.Namespace || got.Account != want.Account || got.AccountUID != want.AccountUID || len(got.Audiences) != len(want.Audiences) {
				t.Fatalf("%+v, %v; want %+v", got, err, want)
			}
		})
	}
	c := newCluster(t)
	c.setFail(func(string, string) error { return errors.New("connection refused") })
	if _, err := kube.NewReviewer(c.client()).Review(t.Context(), "TOKEN", []string{"a"}); !kube.MayPass(err) || errors.Is(err, kube.ErrTokenRefused) || strings.Contains(err.Error(), "TOKEN") {
		t.Error(err)
	}
}
