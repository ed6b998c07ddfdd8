package jws

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"time"
)

// fetcher gets small JSON documents through a guard: no redirects, no proxy (it
// would dial in our place, past the guard), one timeout, one size.
type fetcher struct {
	guard  *guard
	client *http.Client
	// timeout in nanoseconds is for all of a fetch, by its context.
	timeout atomic.Int64
}

func newFetcher(g *guard, roots *x509.CertPool, timeout time.Duration) *fetcher {
	dialer := &net.Dialer{Control: g.control}
	f := &fetcher{
		guard: g,
		client: &http.Client{
			Transport: &http.Transport{
				DialContext:            dialer.DialContext,
				TLSClientConfig:        &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12},
				MaxResponseHeaderBytes: 16 << 10,
				// A fetch every 20 minutes: a kept connection would only rot, and
				// its address would not be judged again.
				DisableKeepAlives: true,
			},
			CheckRedirect: func(*http.Request, []*http.Request) error {
				return http.ErrUseLastResponse
			},
		},
	}
	f.timeout.Store(int64(timeout))
	return f
}

func (f *fetcher) get(ctx context.Context, url string) ([]byte, error) {
	if err := f.guard.checkURL(url); err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", "application/json")
	resp, err := f.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		if resp.StatusCode/100 == 3 {
			return nil, fmt.Errorf("%q answered with a redirect, which is not followed; configure the final URL", url)
		}
		return nil, fmt.Errorf("%q answered %d", url, resp.StatusCode)
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxJWKS+1))
	if err != nil {
		return nil, fmt.Errorf("%q: %w", url, err)
	}
	if len(body) > maxJWKS {
		return nil, fmt.Errorf("%q answered with more than %d bytes", url, maxJWKS)
	}
	return body, nil
}

// keySet fetches the set of a source, by OIDC discovery where it says so. The
// timeout is for all of it.
func (f *fetcher) keySet(ctx context.Context, source string) (*KeySet, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Duration(f.timeout.Load()))
	defer cancel()
	url, ok := strings.CutPrefix(source, "jwks:")
	if !ok {
		issuer := strings.TrimPrefix(source, "oidc:")
		var err error
		if url, err = f.discover(ctx, issuer); err != nil {
			return nil, err
		}
	}
	body, err := f.get(ctx, url)
	if err != nil {
		return nil, err
	}
	return ParseJWKS(body)
}

// discover reads jwks_uri from an issuer's metadata (OpenID Connect Discovery
// 4): its issuer member must be the one asked for, or the document is another's.
func (f *fetcher) discover(ctx context.Context, issuer string) (string, error) {
	body, err := f.get(ctx, strings.TrimSuffix(issuer, "/")+"/.well-known/openid-configuration")
	if err != nil {
		return "", err
	}
	doc, err := parseObject(body)
	if err != nil {
		return "", fmt.Errorf("openid-configuration of %q: %w", issuer, err)
	}
	if got, _ := doc["issuer"].(string); got != issuer {
		return "", fmt.Errorf("openid-configuration of %q is of issuer %q", issuer, clip(got))
	}
	uri, _ := doc["jwks_uri"].(string)
	if uri == "" {
		return "", errors.New("openid-configuration has no jwks_uri")
	}
	return uri, nil
}
