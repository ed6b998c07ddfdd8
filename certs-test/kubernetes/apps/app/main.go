// Command app is the application in the tests' pods. It knows nothing of the mesh: it
// serves every protocol on its own port, and makes the calls that it is told to make
// on its control port.
package main

import (
	"errors"
	"fmt"
	"log"
	"net"
	"net/http"
	"os"
	"time"

	"castellan.dev/certs-test/kubernetes/apps/control"
)

func main() {
	if err := run(); err != nil {
		log.Fatal(err)
	}
}

func run() error {
	started := time.Now()
	pod := os.Getenv("POD_NAME")
	ended := make(chan error)
	serve := func(port int, serve func(net.Listener) error) error {
		l, err := net.Listen("tcp", fmt.Sprintf(":%d", port))
		if err != nil {
			return err
		}
		go func() { ended <- fmt.Errorf("port %d: %w", port, serve(l)) }()
		return nil
	}
	web := answers(pod)
	calls := grpcServer(pod)
	source := openSource(started)
	err := errors.Join(
		serve(control.HTTP, server(web, false).Serve),
		serve(control.Excluded, server(web, false).Serve),
		serve(control.Any, server(either(web, calls), true).Serve),
		serve(control.GRPC, calls.Serve),
		serve(control.TCP, func(l net.Listener) error { return echo(l, "") }),
		serve(control.Greeting, func(l net.Listener) error { return echo(l, control.Greeted) }),
		serve(control.Control, server(newCaller(started, source).handler(), false).Serve),
	)
	if source != nil {
		err = errors.Join(err, serve(control.SPIFFE, source.serve(web)))
	}
	if err != nil {
		return err
	}
	return <-ended
}

func server(h http.Handler, alsoHTTP2 bool) *http.Server {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(alsoHTTP2)
	return &http.Server{Handler: h, Protocols: protocols, ReadHeaderTimeout: time.Minute}
}
