package capture

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"syscall"
	"time"

	"castellan.dev/proxy/original"
)

// trialTime is how long a connection within the kernel may take.
const trialTime = 2 * time.Second

// What a trial came to.
const (
	trialDone    = "redirected"
	trialNone    = "nothing of the family is captured"
	trialNoRoute = "no route to try"
	trialTaken   = "the proxy runs already"
	trialOwn     = "own traffic is not captured"
)

// documentation addresses belong to nobody (RFC 5737, RFC 3849), so that a
// connection which is not redirected reaches no one.
var documentation = map[string]netip.Addr{
	ipv4.name: netip.MustParseAddr("192.0.2.1"),
	ipv6.name: netip.MustParseAddr("2001:db8::1"),
}

// try connects to an address that is captured and expects to meet itself on the
// outbound port: a kernel may take rules that it cannot carry out.
func (p *plan) try(ctx context.Context, f family) (string, error) {
	dst, ok := p.sample(f)
	switch {
	case !ok:
		return trialNone, nil
	case os.Geteuid() == int(p.uid):
		return trialOwn, nil
	}
	at := net.IPv4(127, 0, 0, 1)
	if f.addr == 16 {
		at = net.IPv6loopback
	}
	tcp, err := net.ListenTCP("tcp", &net.TCPAddr{IP: at, Port: int(p.outbound)})
	if errors.Is(err, syscall.EADDRINUSE) {
		return trialTaken, nil
	}
	if err != nil {
		return "", fmt.Errorf("listening for a trial connection: %w", err)
	}
	var listener net.Listener = tcp
	defer listener.Close()
	conn, err := (&net.Dialer{Timeout: trialTime}).DialContext(ctx, "tcp", dst.String())
	if errors.Is(err, syscall.ENETUNREACH) || errors.Is(err, syscall.EADDRNOTAVAIL) {
		// Nothing can leave this way, so nothing can leave uncaptured.
		return trialNoRoute, nil
	}
	if err != nil {
		return "", fmt.Errorf("a connection to %s was not redirected to port %d: %w", dst, p.outbound, err)
	}
	defer conn.Close()
	if err := tcp.SetDeadline(time.Now().Add(trialTime)); err != nil { //nolint:forbidigo // a deadline of the kernel's
		return "", err
	}
	accepted, err := listener.Accept()
	if err != nil {
		return "", fmt.Errorf("a connection to %s was taken by another than port %d: %w", dst, p.outbound, err)
	}
	defer accepted.Close()
	got, err := original.Destination(accepted)
	if err != nil {
		return "", err
	}
	if got != dst {
		return "", fmt.Errorf("a redirected connection to %s is said to be for %s", dst, got)
	}
	return trialDone, nil
}

// sample is some address and port of the family that is captured and not the
// pod's own; false when none could be found.
func (p *plan) sample(f family) (netip.AddrPort, bool) {
	addresses := []netip.Addr{documentation[f.name]}
	for _, r := range p.addressesIncluded {
		addr := r.Addr()
		if addr.Is4() == (f.addr == 4) && !addr.IsUnspecified() && !addr.IsMulticast() && !isOwn(addr) {
			addresses = append(addresses, addr)
		}
	}
	ports := []uint16{65000, 80, 1}
	for _, r := range p.outboundIncluded {
		ports = append(ports, r.First)
	}
	for _, port := range ports {
		for _, addr := range addresses {
			if dst := netip.AddrPortFrom(addr, port); p.captures(dst) {
				return dst, true
			}
		}
	}
	return netip.AddrPort{}, false
}

func isOwn(addr netip.Addr) bool {
	own, err := net.InterfaceAddrs()
	return err != nil || slices.ContainsFunc(own, func(a net.Addr) bool {
		prefix, err := netip.ParsePrefix(a.String())
		return err == nil && prefix.Addr() == addr
	})
}
