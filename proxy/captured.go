package proxy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"castellan.dev/proxy/original"
)

// Reasons that a captured connection is refused at the door.
const (
	refusedOriginal = "no_original_destination"
	refusedForeign  = "destination_not_own"
	refusedLoop     = "own_listener"
)

// The application's connections come from here, as Istio's do: by this source the
// kernel's rules know that they are not to be captured once more.
var (
	appSource4 = netip.AddrFrom4([4]byte{127, 0, 0, 6})
	appSource6 = netip.AddrFrom16([16]byte{15: 6})
)

// captured is what a proxy knows of its pod, to which traffic is redirected by
// the kernel.
type captured struct {
	now func() time.Time
	// ports are the proxy's own: a connection to one of them would come back to us.
	ports map[uint16]bool
	// dialer4 and dialer6 reach the application.
	dialer4, dialer6 net.Dialer

	own atomic.Pointer[map[netip.Addr]bool]
	mu  sync.Mutex
	// readAt is when own was read last.
	readAt time.Time
}

// ownEvery is how often the pod's addresses are read at most.
const ownEvery = time.Second

func newCaptured(now func() time.Time, ports ...uint16) *captured {
	c := &captured{now: now, ports: map[uint16]bool{}}
	for _, port := range ports {
		if port != 0 {
			c.ports[port] = true
		}
	}
	// Bound to an address alone, the kernel chooses the port when it knows the
	// destination, so that one port serves many destinations (ip(7)).
	late := func(_, _ string, raw syscall.RawConn) error {
		var optErr error
		err := raw.Control(func(fd uintptr) {
			optErr = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1)
		})
		return errors.Join(err, optErr)
	}
	c.dialer4 = net.Dialer{KeepAlive: keepAlive, Control: late, LocalAddr: &net.TCPAddr{IP: appSource4.AsSlice()}}
	c.dialer6 = net.Dialer{KeepAlive: keepAlive, Control: late, LocalAddr: &net.TCPAddr{IP: appSource6.AsSlice()}}
	return c
}

// DialApp connects to an address of the pod as the application's own proxy: past
// what the kernel would redirect.
func (p *Proxy) DialApp(ctx context.Context, network, address string) (net.Conn, error) {
	d := &p.dialer
	if at, err := netip.ParseAddrPort(address); err == nil && p.captured != nil {
		d = p.captured.dialer(at.Addr())
	}
	return d.DialContext(ctx, network, address)
}

func (c *captured) dialer(addr netip.Addr) *net.Dialer {
	if addr.Is4() {
		return &c.dialer4
	}
	return &c.dialer6
}

// isOwn reports whether an address is the pod's. Loopback is not: nothing is
// redirected from it, and link-local ones mean nothing without their link.
func (c *captured) isOwn(addr netip.Addr) bool {
	if own := c.own.Load(); own != nil && (*own)[addr] {
		return true
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if now := c.now(); now.Sub(c.readAt) >= ownEvery || now.Before(c.readAt) {
		c.readAt = now
		own := ownAddresses()
		c.own.Store(&own)
	}
	return (*c.own.Load())[addr]
}

// ownAddresses are those of the pod's interfaces; none where they cannot be read,
// and then nothing is accepted.
func ownAddresses() map[netip.Addr]bool {
	own := map[netip.Addr]bool{}
	all, err := net.InterfaceAddrs()
	if err != nil {
		return own
	}
	for _, a := range all {
		prefix, err := netip.ParsePrefix(a.String())
		if err != nil {
			continue
		}
		addr := prefix.Addr().Unmap()
		if addr.IsGlobalUnicast() && addr != appSource6 {
			own[addr] = true
		}
	}
	return own
}

// loops reports whether an address is that of one of our own listeners. A nil c
// has none.
func (c *captured) loops(address string) bool {
	if c == nil {
		return false
	}
	at, err := netip.ParseAddrPort(address)
	return err == nil && c.loopsTo(at)
}

func (c *captured) loopsTo(at netip.AddrPort) bool {
	return c.ports[at.Port()] && (at.Addr().IsLoopback() || c.isOwn(at.Addr()))
}

// inbound makes of a connection's original destination the application's port that
// it is for. A destination that is not the pod's would make us an open relay.
func (p *Proxy) capturedInbound(dst netip.AddrPort) (*inbound, string) {
	c := p.captured
	switch {
	case c.ports[dst.Port()]:
		return nil, refusedLoop
	case !c.isOwn(dst.Addr()):
		return nil, refusedForeign
	}
	in := newInbound(p, dst.Port(), dst.String())
	in.address, in.dialer = dst.Addr(), c.dialer(dst.Addr())
	return in, ""
}

// capturedOutbound makes of it where the application wants to go.
func (p *Proxy) capturedOutbound(dst netip.AddrPort) (*outbound, string) {
	if p.captured.loopsTo(dst) || dst.Addr().IsLoopback() {
		return nil, refusedLoop
	}
	out := &outbound{p: p, original: dst}
	if at, refused := out.resolve(p.store.load()); refused == nil {
		out.name = at.port.service
	} else {
		out.name = dst.String()
	}
	return out, ""
}

func (p *Proxy) secureCapturedInbound(ctx context.Context, conn net.Conn, source netip.AddrPort) func(*place) {
	dst, err := original.Destination(conn)
	if err != nil {
		p.refuse(inboundSide, refusedOriginal, source, err)
		conn.Close()
		return nil
	}
	in, reason := p.capturedInbound(dst)
	if reason != "" {
		p.refuse(inboundSide, reason, source, fmt.Errorf("original destination %s", dst))
		conn.Close()
		return nil
	}
	return in.secure(ctx, conn, source)
}

func (p *Proxy) secureCapturedOutbound(ctx context.Context, conn net.Conn, source netip.AddrPort) func(*place) {
	dst, err := original.Destination(conn)
	if err != nil {
		p.refuse(outboundSide, refusedOriginal, source, err)
		conn.Close()
		return nil
	}
	out, reason := p.capturedOutbound(dst)
	if reason != "" {
		p.refuse(outboundSide, reason, source, fmt.Errorf("original destination %s", dst))
		conn.Close()
		return nil
	}
	return out.serving(ctx, conn, source)
}
