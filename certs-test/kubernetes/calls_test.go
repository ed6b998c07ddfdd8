package kubernetes_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"

	"castellan.dev/certs-test/kubernetes/apps/control"
)

// ask speaks to the application's control port.
func (a *app) ask(method, path string, in, out any) error {
	body, err := json.Marshal(in)
	if err != nil {
		return err
	}
	req, err := http.NewRequest(method, "http://"+net.JoinHostPort(a.IP, fmt.Sprint(control.Control))+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	resp, err := controller().Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s of %s: %w", path, a.Name, &statusError{resp.StatusCode, string(data)})
	}
	return json.Unmarshal(data, out)
}

// call lets the application make a call.
func (a *app) call(c control.Call) (r control.Result, err error) {
	return r, a.ask("POST", "/call", c, &r)
}

// get is an HTTP request over a connection of its own.
func (a *app) get(url string, header ...string) (control.Result, error) {
	return a.call(get(url, header...))
}

func get(url string, header ...string) control.Call {
	c := control.Call{Kind: "http", URL: url, Fresh: true, Header: map[string]string{}}
	for i := 0; i+1 < len(header); i += 2 {
		c.Header[header[i]] = header[i+1]
	}
	return c
}

// reaches asks until the answer is 200, and returns it.
func (a *app) reaches(t testing.TB, url string, header ...string) control.Result {
	t.Helper()
	return a.answers(t, http.StatusOK, url, header...)
}

// answers asks until the answer has the status.
func (a *app) answers(t testing.TB, want int, url string, header ...string) control.Result {
	t.Helper()
	return a.hears(t, want, get(url, header...))
}

// hears is answers for any call.
func (a *app) hears(t testing.TB, want int, c control.Call) (r control.Result) {
	t.Helper()
	c.Fresh = true
	eventually(t, fmt.Sprintf("%s -> %s %s is %d", a.Name, c.Method, c.URL, want), func() (err error) {
		if r, err = a.call(c); err != nil {
			return err
		}
		if r.Status != want {
			return fmt.Errorf("%+v", r)
		}
		return nil
	})
	return r
}

// timedOut says that a call has no outcome: somebody was slow, which proves nothing.
func timedOut(r control.Result) bool {
	return saysAny(r.Error, "deadline exceeded", "DeadlineExceeded", "i/o timeout", "Client.Timeout")
}

func saysAny(text string, words ...string) bool {
	return slices.ContainsFunc(words, func(w string) bool { return strings.Contains(text, w) })
}

// severed is how calls fail whose connection the other side has ended without a word.
var severed = []string{"EOF", "connection reset by peer", "broken pipe", `came back as ""`}

// fails makes a call until it fails twice in a row, in the same way, and the application
// has not been reached: without an answer, or with one of a proxy. Once may be chance.
// The error must say one of the words, if there are any.
func (a *app) fails(t *testing.T, c control.Call, words ...string) (r control.Result) {
	t.Helper()
	c.Fresh = true
	last := -1
	eventually(t, fmt.Sprintf("%s cannot call %s %s", a.Name, c.Kind, c.URL), func() (err error) {
		if r, err = a.call(c); err != nil {
			return err
		}
		if r.Error == "" && r.Status < 400 || r.Seen != nil {
			last = -1
			return fmt.Errorf("%+v", r)
		}
		if timedOut(r) || len(words) > 0 && !saysAny(r.Error, words...) {
			last = -1
			return fmt.Errorf("another failure than %q: %+v", words, r)
		}
		if last != r.Status {
			last = r.Status
			return fmt.Errorf("failed once: %+v", r)
		}
		return nil
	})
	return r
}

// url of the application by its pod's address.
func (a *app) url(port int, path string) string {
	return "http://" + a.addr(port) + path
}

func (a *app) addr(port int) string { return net.JoinHostPort(a.IP, fmt.Sprint(port)) }

// calledBy fails the test unless the application saw the caller, proved by mutual TLS.
func calledBy(t *testing.T, r control.Result, caller *app) {
	t.Helper()
	if r.Seen == nil {
		t.Fatalf("no answer of the application: %+v", r)
	}
	var xfcc []string
	for name, values := range r.Seen.Header { // gRPC's are in lower case
		if strings.EqualFold(name, "x-forwarded-client-cert") {
			xfcc = values
		}
	}
	if len(xfcc) != 1 || !strings.Contains(xfcc[0], "URI="+caller.id()) {
		t.Errorf("the application saw the caller %q, want %s", xfcc, caller.id())
	}
}

// outcome is an error unless the call was answered with success.
func outcome(r control.Result) error {
	if r.Error != "" || r.Status >= 400 {
		return fmt.Errorf("%+v", r)
	}
	return nil
}
