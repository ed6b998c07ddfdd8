package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"k8s.io/client-go/rest"

	"castellan.dev/internal/jws"
)

const (
	discoveryPath = "/.well-known/openid-configuration"
	// keysPath is where every API server has its keys. The jwks_uri of its discovery
	// document may name some other place for others; ours is the way we trust.
	keysPath = "/openid/v1/jwks"

	// keysEvery bounds how long a key that the API server has withdrawn is accepted;
	// a new one is fetched when its first token comes.
	keysEvery      = 5 * time.Minute
	keysFirstRetry = time.Second
)

// FindIssuer asks the API server under which name it issues service-account tokens.
//
// RBAC: nonResourceURLs /.well-known/openid-configuration and /openid/v1/jwks, get;
// every service account has it by default (system:service-account-issuer-discovery).
func FindIssuer(ctx context.Context, c *Client) (string, error) {
	data, err := getPath(ctx, c, discoveryPath)
	if err != nil {
		return "", err
	}
	var doc struct {
		Issuer string `json:"issuer"`
	}
	if err := json.Unmarshal(data, &doc); err != nil || doc.Issuer == "" {
		return "", away(errors.New("it names no issuer"), "the API server's %s", discoveryPath)
	}
	return doc.Issuer, nil
}

// IssuerKeys keeps the keys of the API server's tokens; run it. An API server that
// changes its name meanwhile is told of as an error: the name is part of what tokens
// are held to, and a restart takes the new one.
func IssuerKeys(c *Client, issuer string, log *slog.Logger, now func() time.Time) (*jws.Remote, error) {
	return jws.NewFetched(jws.FetchedConfig{
		Name: "the API server's token keys", Every: keysEvery, FirstRetry: keysFirstRetry, Log: log, Now: now,
		Fetch: func(ctx context.Context) ([]byte, error) {
			name, err := FindIssuer(ctx, c)
			if err != nil {
				return nil, err
			}
			if name != issuer {
				return nil, fmt.Errorf("the API server issues as %q now and no longer as %q; start castellan-server again when all API servers do", name, issuer)
			}
			return getPath(ctx, c, keysPath)
		},
	})
}

func getPath(ctx context.Context, c *Client, path string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	client, ok := c.bounded.Discovery().RESTClient().(*rest.RESTClient)
	if !ok || client == nil {
		return nil, errors.New("kube: this client has no way to the API server's own paths")
	}
	// The key set has a media type of its own, and the API server insists on it.
	data, err := client.Get().AbsPath(path).SetHeader("Accept", "application/json, application/jwk-set+json").Do(ctx).Raw()
	if err != nil {
		return nil, away(err, "get %s of the API server", path)
	}
	return data, nil
}
