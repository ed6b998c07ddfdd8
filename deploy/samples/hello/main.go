// Command hello is the application of the Kubernetes walk-through: a server that
// says who called it, and a client for images without a shell. It knows nothing of
// certificates or policy; that is the point of it.
//
//	hello serve [-listen :8080]     answer every request with a line
//	hello get URL...                print status and body of each; exit 1 unless all are 2xx
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
	client := &http.Client{Timeout: timeout}
	refused := 0
	for _, url := range urls {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, http.NoBody)
		if err != nil {
			return err
		}
		resp, err := client.Do(req)
		if err != nil {
			return err
		}
		body, err := io.ReadAll(io.LimitReader(resp.Body, maxBody))
		resp.Body.Close()
		if err != nil {
			return err
		}
		fmt.Fprintf(stdout, "%d %s\n", resp.StatusCode, strings.TrimSpace(string(body)))
		if resp.StatusCode/100 != 2 {
			refused++
		}
	}
	if refused > 0 {
		return fmt.Errorf("%d of %d were not answered with 2xx", refused, len(urls))
	}
	return nil
}
