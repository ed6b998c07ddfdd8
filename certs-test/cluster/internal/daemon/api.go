package daemon

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"time"
)

// api asks the API server as an administrator. It is a few lines of HTTP and not
// client-go, so that the cluster's own command builds in a second.
type api struct {
	client *http.Client
	token  string
}

func newAPI(caFile, token string) (*api, error) {
	pem, err := os.ReadFile(caFile)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}
	return &api{client: &http.Client{Transport: transport, Timeout: 10 * time.Second}, token: token}, nil
}

// call sends body, when there is one, and decodes the answer into result, when asked to.
func (a *api) call(ctx context.Context, method, path, contentType string, body, result any) error {
	var payload io.Reader
	if body != nil {
		data, err := json.Marshal(body)
		if err != nil {
			return err
		}
		payload = bytes.NewReader(data)
	}
	req, err := http.NewRequestWithContext(ctx, method, server+path, payload)
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bearer "+a.token)
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	resp, err := a.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode/100 != 2 {
		return fmt.Errorf("%s %s: %s: %.300s", method, path, resp.Status, data)
	}
	if result == nil {
		return nil
	}
	return json.Unmarshal(data, result)
}

func (a *api) get(ctx context.Context, path string, result any) error {
	return a.call(ctx, http.MethodGet, path, "", nil, result)
}

func (a *api) ok(path string) func(context.Context) error {
	return func(ctx context.Context) error { return a.get(ctx, path, nil) }
}

// get asks a health address.
func get(url string) func(context.Context) error {
	return probe(&http.Client{Timeout: 2 * time.Second}, url)
}

// getTLS asks a health address on loopback whose certificate its server made itself.
func getTLS(url string) func(context.Context) error {
	transport := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}} //nolint:gosec // health on loopback, no credential is sent
	return probe(&http.Client{Timeout: 2 * time.Second, Transport: transport}, url)
}

func probe(client *http.Client, url string) func(context.Context) error {
	return func(ctx context.Context) error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return err
		}
		resp, err := client.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("%s: %s", url, resp.Status)
		}
		return nil
	}
}

func writeJSON(path string, value any) error {
	data, err := json.MarshalIndent(value, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, data, 0o600)
}
