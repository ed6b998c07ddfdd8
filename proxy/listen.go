package proxy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"syscall"
)

// Listen opens every listener, or none.
func (p *Proxy) Listen() (err error) {
	defer func() {
		if err != nil {
			for _, a := range p.acceptors {
				a.listener.Close()
			}
			p.acceptors = nil
		}
	}()
	for _, c := range p.cfg.Proxy.Inbound {
		l, err := net.Listen("tcp", c.Listen)
		if err != nil {
			return fmt.Errorf("proxy: inbound listener: %w", err)
		}
		port := c.Port
		if port == 0 {
			port = addrPort(l.Addr()).Port()
		}
		p.serveOn(l, inboundSide, newInbound(p, port, c.App).secure)
	}
	for _, c := range p.cfg.Proxy.Outbound {
		l, err := net.Listen("tcp", c.Listen)
		if err != nil {
			return fmt.Errorf("proxy: outbound listener for %s: %w", c.Service, err)
		}
		out := &outbound{p: p, service: c.Service, port: c.Port, name: c.Service}
		p.serveOn(l, outboundSide, func(ctx context.Context, conn net.Conn, source netip.AddrPort) func(*place) {
			return out.serving(ctx, conn, source)
		})
	}
	return p.listenCaptured()
}

func (p *Proxy) serveOn(l net.Listener, side direction, secure secureFunc) *acceptor {
	a := &acceptor{p: p, side: side, listener: l, limits: &p.limits, secure: secure}
	p.acceptors = append(p.acceptors, a)
	return a
}

// listenCaptured opens the ports that the kernel redirects to, of each family by
// itself: the original destination is asked for in the family's own way. What the
// pod sends is redirected to loopback, so others never get to see that port.
func (p *Proxy) listenCaptured() error {
	c := p.cfg.Proxy.Capture
	if c == nil {
		return nil
	}
	for _, family := range []struct{ network, any, loopback string }{{"tcp4", "0.0.0.0", "127.0.0.1"}, {"tcp6", "::", "::1"}} {
		if c.Inbound != 0 {
			l, err := listenFamily(family.network, family.any, c.Inbound)
			if err != nil {
				return fmt.Errorf("proxy: captured inbound listener: %w", err)
			}
			if l != nil {
				p.serveOn(l, inboundSide, p.secureCapturedInbound)
			}
		}
		if c.Outbound != 0 {
			l, err := listenFamily(family.network, family.loopback, c.Outbound)
			if err != nil {
				return fmt.Errorf("proxy: captured outbound listener: %w", err)
			}
			if l != nil {
				p.serveOn(l, outboundSide, p.secureCapturedOutbound).limits = &p.outLimits
			}
		}
	}
	return nil
}

// listenFamily returns nil where a pod has no IPv6: what is redirected there all
// the same meets nobody.
func listenFamily(network, host string, port uint16) (net.Listener, error) {
	l, err := net.Listen(network, net.JoinHostPort(host, strconv.Itoa(int(port))))
	if network == "tcp6" && (errors.Is(err, syscall.EAFNOSUPPORT) || errors.Is(err, syscall.EADDRNOTAVAIL)) {
		return nil, nil //nolint:nilnil // no listener, and no error either
	}
	return l, err
}
