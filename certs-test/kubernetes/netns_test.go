package kubernetes_test

import (
	"context"
	"net"
	"net/http"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"castellan.dev/certs-test/cluster"
)

// dialFrom dials from a node's network, as a process of the node does. Pods and
// services are reached by address: the test itself is no part of the cluster's network.
func dialFrom(node *cluster.Node) func(ctx context.Context, network, addr string) (net.Conn, error) {
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		type outcome struct {
			conn net.Conn
			err  error
		}
		done := make(chan outcome, 1)
		go func() {
			// The thread is never given back: it ends with this goroutine.
			runtime.LockOSThread()
			conn, err := dialInside(ctx, node.NetNS, network, addr)
			done <- outcome{conn, err}
		}()
		o := <-done
		return o.conn, o.err
	}
}

func dialInside(ctx context.Context, netns, network, addr string) (net.Conn, error) {
	f, err := os.Open(netns)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if err := unix.Setns(int(f.Fd()), unix.CLONE_NEWNET); err != nil {
		return nil, os.NewSyscallError("setns", err)
	}
	return (&net.Dialer{Timeout: 30 * time.Second}).DialContext(ctx, network, addr)
}

// fromNode is an HTTP client in the network of a node.
func fromNode(name string) *http.Client {
	node, err := shared.Node(name)
	if err != nil {
		panic(err)
	}
	// A connection is not kept: pods go, and others get their addresses.
	return &http.Client{Timeout: 90 * time.Second, Transport: &http.Transport{DialContext: dialFrom(node), DisableKeepAlives: true}}
}
