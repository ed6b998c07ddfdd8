// Command hello is the application of the Kubernetes walk-through: a server that
// says who called it, and a client for images without a shell. It knows nothing of
// certificates or policy; that is the point of it.
//
//	hello serve [-listen :8080]     answer every request with a line
//	hello get URL...                print status and body of each; exit 1 unless all are 2xx.
//	                                Without an answer, and after 502 and 503, ask again for 20 s
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"
)

const (
	timeout = 10 * time.Second
	maxBody = 64 << 10

	// settling is how long what is new may take to be known, and again when to ask anew.
	settling = 20 * time.Second
	again    = 200 * time.Millisecond
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "hello:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdout io.Writer) error {
	switch {
	case len(args) == 1 && args[0] == "serve":
		return serve(ctx, ":8080")
	case len(args) == 3 && args[0] == "serve" && args[1] == "-listen":
		return serve(ctx, args[2])
	case len(args) > 1 && args[0] == "get":
		return get(ctx, args[1:], stdout)
	}
	return errors.New("usage: hello serve [-listen ADDRESS] | hello get URL [URL]")
}

func serve(ctx context.Context, address string) error {
	name := cmp.Or(os.Getenv("POD_NAME"), "hello")
	server := &http.Server{
		Addr: address, ReadHeaderTimeout: timeout, ReadTimeout: timeout, WriteTimeout: timeout, MaxHeaderBytes: 32 << 10,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprintf(w, "%s: %s %s for %s\n", name, r.Method, r.URL.Path, caller(r))
		}),
	}
	defer context.AfterFunc(ctx, func() {
		ending, cancel := context.WithTimeout(context.WithoutCancel(ctx), timeout)
		defer cancel()
		_ = server.Shutdown(ending) // what is left after that ends with the process
	})()
	if err := server.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// caller is who the proxy in front says it was; it removes what clients put there.
func caller(r *http.Request) string {
	for part := range strings.SplitSeq(r.Header.Get("X-Forwarded-Client-Cert"), ";") {
		if id, ok := strings.CutPrefix(part, "URI="); ok {
			return id
		}
	}
	return "somebody without a certificate"
}

func get(ctx context.Context, urls []string, stdout io.Writer) error {
	refused := 0
	for _, url := range urls {
		a, err := settled(ctx, url, settling)
		if err != nil {
			return err
		}
		fmt.Fprintf(stdout, "%d %s\n", a.status, strings.TrimSpace(a.body))
		if a.status/100 != 2 {
			refused++
		}
	}
	if refused > 0 {
		return fmt.Errorf("%d of %d were not answered with 2xx", refused, len(urls))
	}
	return nil
}

type answer struct {
	status int
	body   string
}

// settled asks until the answer is the service's own. A service that has just become
// ready is known on the caller's node a moment later, as in any cluster; until then a
// proxy answers in its place with 502 or 503, and without a proxy nobody does.
func settled(ctx context.Context, url string, patience time.Duration) (answer, error) {
	giveUp := time.NewTimer(patience)
	defer giveUp.Stop()
	for {
		a, err := ask(ctx, url)
		if err == nil && a.status != http.StatusBadGateway && a.status != http.StatusServiceUnavailable {
			return a, nil
		}
		select {
		case <-ctx.Done():
			return a, err
		case <-giveUp.C:
			return a, err
		case <-time.After(again):
		}
	}
}

func ask(ctx context.Context, url string) (answer, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, http.NoBody)
	if err != nil {
		return answer{}, err
	}
	resp, err := (&http.Client{Timeout: timeout}).Do(req)
	if err != nil {
		return answer{}, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxBody))
	return answer{resp.StatusCode, string(body)}, err
}
