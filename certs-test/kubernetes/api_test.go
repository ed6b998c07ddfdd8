package kubernetes_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"sigs.k8s.io/yaml"
)

// apiClient speaks to the API server in JSON: polling through kubectl would cost a
// process each time. What users do with kubectl is done with kubectl.
type apiClient struct {
	server, token string
	http          *http.Client
}

func newAPIClient(kubeconfig string) (*apiClient, error) {
	data, err := os.ReadFile(kubeconfig)
	if err != nil {
		return nil, err
	}
	var file struct {
		Clusters []struct {
			Cluster struct {
				Server string
				CA     []byte `json:"certificate-authority-data"`
			}
		}
		Users []struct{ User struct{ Token string } }
	}
	if err := yaml.Unmarshal(data, &file); err != nil {
		return nil, err
	}
	if len(file.Clusters) != 1 || len(file.Users) != 1 {
		return nil, errors.New("the kubeconfig is not of one cluster and one user")
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(file.Clusters[0].Cluster.CA) {
		return nil, errors.New("the kubeconfig has no authority")
	}
	return &apiClient{
		server: file.Clusters[0].Cluster.Server, token: file.Users[0].User.Token,
		http: &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{
			TLSClientConfig: &tls.Config{RootCAs: roots}, MaxIdleConnsPerHost: 32, ForceAttemptHTTP2: true,
		}},
	}, nil
}

// as is the same client with another's token.
func (c *apiClient) as(token string) *apiClient { return &apiClient{c.server, token, c.http} }

// statusError is an answer that is no success.
type statusError struct {
	code int
	text string
}

func (e *statusError) Error() string { return fmt.Sprintf("%d %s", e.code, e.text) }

func isStatus(err error, code int) bool {
	var s *statusError
	return errors.As(err, &s) && s.code == code
}

// do asks; in and out are JSON, and either may be nil.
func (c *apiClient) do(method, path, contentType string, in, out any) error {
	var body io.Reader
	if in != nil {
		data, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(data)
	}
	req, err := http.NewRequest(method, c.server+path, body)
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bearer "+c.token)
	req.Header.Set("Content-Type", contentType)
	resp, err := c.http.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode >= 300 {
		return fmt.Errorf("%s %s: %w", method, path, &statusError{resp.StatusCode, string(data)})
	}
	switch out := out.(type) {
	case nil:
		return nil
	case *string:
		*out = string(data)
		return nil
	}
	return json.Unmarshal(data, out)
}

func (c *apiClient) get(path string, out any) error { return c.do("GET", path, "", nil, out) }

func (c *apiClient) post(path string, in, out any) error {
	return c.do("POST", path, "application/json", in, out)
}

func (c *apiClient) remove(path string) error { return c.do("DELETE", path, "", nil, nil) }

// merge is a JSON merge patch.
func (c *apiClient) merge(path string, in any) error {
	return c.do("PATCH", path, "application/merge-patch+json", in, nil)
}

type object = map[string]any

// result is what a command printed.
type result struct{ out, err string }

func (r result) String() string { return "stdout: " + r.out + "\nstderr: " + r.err }

// run runs a command to its end.
func run(ctx context.Context, stdin, name string, args ...string) (result, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+shared.Kubeconfig())
	cmd.Stdin = strings.NewReader(stdin)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	r := result{out.String(), errs.String()}
	if err != nil {
		err = fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, r)
	}
	return r, err
}

// castellan runs the command under test against the cluster.
func castellan(ctx context.Context, args ...string) (result, error) {
	return run(ctx, "", path("castellan"), args...)
}

func kubectl(stdin string, args ...string) (result, error) {
	return run(context.Background(), stdin, shared.Kubectl(), append([]string{"--request-timeout=30s"}, args...)...)
}

// apply applies a user's YAML with kubectl, and removes it when the test ends.
func apply(t testing.TB, text string) result {
	t.Helper()
	r, err := applied(text)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if _, err := kubectl(text, "delete", "--ignore-not-found", "--wait=false", "-f", "-"); err != nil {
			t.Error(err)
		}
	})
	return r
}

func applied(text string) (r result, err error) {
	err = admitted(func() (err error) {
		r, err = kubectl(text, "apply", "-f", "-")
		return err
	})
	return r, err
}

// admitted asks again while a webhook gives no answer, as where its one server has just
// become ready: what tests want to know is the answer.
func admitted(ask func() error) error {
	for deadline := time.Now().Add(patience); ; time.Sleep(100 * time.Millisecond) {
		if err := ask(); err == nil || !strings.Contains(err.Error(), "failed calling webhook") || time.Now().After(deadline) {
			return err
		}
	}
}

// refused is kubectl's refusal of a user's YAML.
func refused(t testing.TB, text string) string {
	t.Helper()
	r, err := kubectl(text, "apply", "-f", "-")
	if err == nil {
		t.Fatalf("applied: %s", r)
	}
	return r.err
}

// namespace makes a namespace for a test; labels are "name=value".
func namespace(t testing.TB, name string, labels ...string) {
	t.Helper()
	set := object{}
	for _, l := range labels {
		k, v, _ := strings.Cut(l, "=")
		set[k] = v
	}
	// One that an earlier test of this cluster left is on its way out.
	eventually(t, "namespace "+name, func() error {
		return api.post("/api/v1/namespaces", object{"metadata": object{"name": name, "labels": set}}, nil)
	})
	t.Cleanup(func() {
		if err := api.remove("/api/v1/namespaces/" + name); err != nil {
			t.Error(err)
		}
	})
}

// injected is the label of a namespace whose pods get a proxy.
const injected = "istio-injection=enabled"
