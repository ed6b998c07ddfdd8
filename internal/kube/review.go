package kube

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/time/rate"
	authenticationv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

const (
	reviewsPerSecond = 500
	reviewBurst      = 1000
	reviewsAtOnce    = 32

	// What a token is bound to, as the API server says it.
	extraPodName  = "authentication.kubernetes.io/pod-name"
	extraPodUID   = "authentication.kubernetes.io/pod-uid"
	extraNodeName = "authentication.kubernetes.io/node-name"
	extraNodeUID  = "authentication.kubernetes.io/node-uid"

	accountPrefix = "system:serviceaccount:"
)

// ErrTokenRefused says that the API server does not accept a token. Any other error
// of a review says that it could not be asked.
var ErrTokenRefused = errors.New("kube: the API server refuses the token")

// Review is what a token proves to the API server. Empty fields: it does not say.
type Review struct {
	Namespace, Account, AccountUID string
	PodName, PodUID                string
	Node, NodeUID                  string
	// Audiences are those of the asked ones that the token is for.
	Audiences []string
}

// Reviewer asks the API server about tokens, bounded in rate and number.
//
// RBAC: tokenreviews.authentication.k8s.io create, cluster-wide (it has no other
// scope); only with kubernetes.verification: tokenReview.
type Reviewer struct {
	api interface {
		Create(ctx context.Context, r *authenticationv1.TokenReview, opts metav1.CreateOptions) (*authenticationv1.TokenReview, error)
	}
	limit  *rate.Limiter
	places chan struct{}
}

// NewReviewer makes a reviewer.
func NewReviewer(c *Client) *Reviewer {
	return &Reviewer{
		api:   c.bounded.AuthenticationV1().TokenReviews(),
		limit: rate.NewLimiter(reviewsPerSecond, reviewBurst), places: make(chan struct{}, reviewsAtOnce),
	}
}

// Review returns what the token proves to one of audiences, or ErrTokenRefused.
func (r *Reviewer) Review(ctx context.Context, token string, audiences []string) (Review, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	select {
	case r.places <- struct{}{}:
		defer func() { <-r.places }()
	case <-ctx.Done():
		return Review{}, away(ctx.Err(), "review a token: too many are reviewed")
	}
	if err := r.limit.Wait(ctx); err != nil {
		return Review{}, away(err, "review a token: too many are reviewed")
	}
	answer, err := r.api.Create(ctx, &authenticationv1.TokenReview{
		Spec: authenticationv1.TokenReviewSpec{Token: token, Audiences: audiences},
	}, metav1.CreateOptions{})
	if err != nil {
		return Review{}, away(err, "review a token")
	}
	return readReview(&answer.Status)
}

func readReview(status *authenticationv1.TokenReviewStatus) (Review, error) {
	if !status.Authenticated {
		cause := status.Error
		if len(cause) > maxCause {
			cause = strings.ToValidUTF8(cause[:maxCause], "")
		}
		return Review{}, fmt.Errorf("%w: %s", ErrTokenRefused, cause)
	}
	name, ok := strings.CutPrefix(status.User.Username, accountPrefix)
	namespace, account, two := strings.Cut(name, ":")
	if !ok || !two {
		return Review{}, fmt.Errorf("%w: it is of a user, not of a service account", ErrTokenRefused)
	}
	extra := func(key string) string {
		if v := status.User.Extra[key]; len(v) == 1 {
			return v[0]
		}
		return "" // several are as good as none
	}
	return Review{
		Namespace: namespace, Account: account, AccountUID: status.User.UID,
		PodName: extra(extraPodName), PodUID: extra(extraPodUID),
		Node: extra(extraNodeName), NodeUID: extra(extraNodeUID),
		Audiences: status.Audiences,
	}, nil
}

// maxCause bounds what of the API server's words goes into our logs.
const maxCause = 256
