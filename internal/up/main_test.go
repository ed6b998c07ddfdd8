package up_test

import (
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"testing"

	"go.uber.org/goleak"
)

// TestMain is also the children that the supervisor's tests start.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "child-serve": // ADDR NAME FILE: serves, and at SIGTERM adds its name to FILE
			serve(os.Args[2], os.Args[3], os.Args[4])
		case "child-stubborn": // ADDR: serves, and does not hear SIGTERM
			signal.Ignore(syscall.SIGTERM)
			_ = http.ListenAndServe(os.Args[2], ok())
		case "child-die":
			fmt.Println("first line")
			fmt.Println("cannot open /nothing: no such file")
			os.Exit(3)
		}
	}
	goleak.VerifyTestMain(m)
}

func ok() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
}

func serve(addr, name, file string) {
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	go func() { _ = http.ListenAndServe(addr, ok()) }()
	<-stop
	f, err := os.OpenFile(file, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err == nil {
		fmt.Fprintln(f, name)
		err = f.Close()
	}
	if err != nil {
		os.Exit(1)
	}
	os.Exit(0)
}

func discard() *slog.Logger { return slog.New(slog.DiscardHandler) }
