package capture

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"

	"castellan.dev/internal/config"
)

// plan is a configuration with its lists read.
type plan struct {
	inbound, outbound uint16
	uid               uint32

	// Without a list of what is captured, all is; but for addresses, where
	// portsOnly says that none is.
	inboundIncluded, inboundExcluded   []config.PortRange
	outboundIncluded, outboundExcluded []config.PortRange
	addressesIncluded                  []netip.Prefix
	addressesExcluded                  []netip.Prefix
	portsOnly                          bool
}

func newPlan(cfg config.Proxy) (p plan, err error) {
	c := cfg.Capture
	p.inbound, p.outbound, p.uid = c.Inbound, c.Outbound, c.UID
	if p.uid == 0 {
		// That is root's, of whom applications may be too.
		return p, errors.New("uid: required")
	}
	var all bool
	if p.inboundIncluded, all, err = c.IncludeInboundPorts.Ranges(); err != nil {
		return p, fmt.Errorf("includeInboundPorts%w", err)
	} else if all {
		p.inboundIncluded = nil
	}
	if p.inboundExcluded, all, err = c.ExcludeInboundPorts.Ranges(); err != nil {
		return p, fmt.Errorf("excludeInboundPorts%w", err)
	} else if all {
		p.inbound = 0
	}
	// Kubelets and collectors come in the clear to the proxy's own ports.
	for _, own := range []string{cfg.Admin, cfg.Ready} {
		_, port, err := net.SplitHostPort(own)
		if n, nErr := strconv.ParseUint(port, 10, 16); err == nil && nErr == nil && n > 0 {
			p.inboundExcluded = append(p.inboundExcluded, config.PortRange{First: uint16(n), Last: uint16(n)})
		}
	}
	var everyPort bool
	if p.outboundIncluded, everyPort, err = c.IncludeOutboundPorts.Ranges(); err != nil {
		return p, fmt.Errorf("includeOutboundPorts%w", err)
	}
	if p.outboundExcluded, all, err = c.ExcludeOutboundPorts.Ranges(); err != nil {
		return p, fmt.Errorf("excludeOutboundPorts%w", err)
	} else if all {
		p.outbound = 0
	}
	return p, p.readAddresses(c, everyPort)
}

func (p *plan) readAddresses(c *config.Capture, everyPort bool) (err error) {
	var all bool
	if p.addressesExcluded, _, err = config.ParseIPRanges(c.ExcludeOutboundIPRanges); err != nil {
		return fmt.Errorf("excludeOutboundIPRanges%w", err)
	}
	if p.addressesIncluded, all, err = config.ParseIPRanges(c.IncludeOutboundIPRanges); err != nil {
		return fmt.Errorf("includeOutboundIPRanges%w", err)
	}
	p.portsOnly = len(p.addressesIncluded) == 0 && !all && len(p.outboundIncluded) > 0
	if all {
		p.addressesIncluded = nil
	}
	if everyPort {
		p.outboundIncluded = []config.PortRange{{First: 1, Last: 65535}}
	}
	return nil
}

// captures reports whether a connection from the pod is redirected, as the rules
// have it.
func (p *plan) captures(dst netip.AddrPort) bool {
	port := func(in []config.PortRange) bool {
		return slices.ContainsFunc(in, func(r config.PortRange) bool { return r.First <= dst.Port() && dst.Port() <= r.Last })
	}
	address := func(in []netip.Prefix) bool {
		return slices.ContainsFunc(in, func(r netip.Prefix) bool { return r.Contains(dst.Addr()) })
	}
	switch {
	case p.outbound == 0 || dst.Addr().IsLoopback() || port(p.outboundExcluded):
		return false
	case port(p.outboundIncluded):
		return true
	case address(p.addressesExcluded) || p.portsOnly:
		return false
	}
	return len(p.addressesIncluded) == 0 || address(p.addressesIncluded)
}

// addressRanges are those of one family, as first and last address, sorted and
// without overlap: the kernel refuses sets that overlap.
func addressRanges(prefixes []netip.Prefix, f family) (ranges []span) {
	for _, p := range prefixes {
		if p.Addr().Is4() == (f.addr == 4) {
			ranges = append(ranges, span{p.Masked().Addr().AsSlice(), lastAddress(p)})
		}
	}
	return merge(ranges)
}

func lastAddress(p netip.Prefix) []byte {
	b := p.Masked().Addr().AsSlice()
	for bit := p.Bits(); bit < len(b)*8; bit++ {
		b[bit/8] |= 0x80 >> (bit % 8)
	}
	return b
}

func portRanges(ports []config.PortRange) []span {
	ranges := make([]span, 0, len(ports))
	for _, r := range ports {
		ranges = append(ranges, span{bigEndian(r.First), bigEndian(r.Last)})
	}
	return merge(ranges)
}

func bigEndian(port uint16) []byte { return []byte{byte(port >> 8), byte(port)} }
