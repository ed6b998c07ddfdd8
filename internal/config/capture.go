package config

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// ProxyUID is the uid, and gid, that castellan-proxy runs as in a pod.
const ProxyUID = 1337

// maxCaptured bounds each list of a Capture.
const maxCaptured = 1024

// Capture says what of a pod's TCP traffic is redirected to the proxy. Left out,
// nothing is. UDP never is.
type Capture struct {
	// Inbound is the port that traffic to the pod is redirected to, in practice
	// 15006; 0 captures none of it.
	Inbound uint16 `json:"inbound,omitempty"`
	// Outbound is the port that traffic from the pod is redirected to, in practice
	// 15001; 0 captures none of it.
	Outbound uint16 `json:"outbound,omitempty"`
	// UID is the proxy's own, whose traffic is never captured; default 1337.
	UID uint32 `json:"uid,omitempty"`

	// IncludeInboundPorts are captured; empty or "*" means all.
	IncludeInboundPorts PortList `json:"includeInboundPorts,omitempty"`
	// ExcludeInboundPorts are not: whoever connects there meets the application, unjudged.
	ExcludeInboundPorts PortList `json:"excludeInboundPorts,omitempty"`

	// IncludeOutboundPorts are captured whatever the address; "*" means all.
	IncludeOutboundPorts PortList `json:"includeOutboundPorts,omitempty"`
	// ExcludeOutboundPorts are not, whatever else says.
	ExcludeOutboundPorts PortList `json:"excludeOutboundPorts,omitempty"`
	// IncludeOutboundIPRanges are captured: addresses, ranges such as "10.0.0.0/8",
	// or "*" for all. Empty means all too, or none where IncludeOutboundPorts says
	// which ports.
	IncludeOutboundIPRanges []string `json:"includeOutboundIPRanges,omitempty"`
	// ExcludeOutboundIPRanges are not, but for IncludeOutboundPorts.
	ExcludeOutboundIPRanges []string `json:"excludeOutboundIPRanges,omitempty"`
}

// PortList holds ports, each a number, a range such as "9000-9010", or "*".
// Items may be given as numbers or strings, and a list of one as its item.
type PortList []string

// UnmarshalJSON takes what PortList says.
func (p *PortList) UnmarshalJSON(b []byte) error {
	var items []json.RawMessage
	if len(b) > 0 && b[0] != '[' {
		items = []json.RawMessage{b}
	} else if err := json.Unmarshal(b, &items); err != nil {
		return err
	}
	list := make(PortList, 0, len(items))
	for _, item := range items {
		var text string
		var number uint16
		if json.Unmarshal(item, &number) == nil {
			text = strconv.Itoa(int(number))
		} else if err := json.Unmarshal(item, &text); err != nil || text == "" {
			return fmt.Errorf(`%s is no port: give a number, a range such as "9000-9010", or "*"`, item)
		}
		list = append(list, text)
	}
	*p = list
	return nil
}

// PortRange is the ports from First to Last.
type PortRange struct{ First, Last uint16 }

// Ranges returns the ports, sorted and without overlap; all says that "*" was among them.
func (p PortList) Ranges() (ranges []PortRange, all bool, err error) {
	if len(p) > maxCaptured {
		return nil, false, fmt.Errorf("%d items, at most %d are taken", len(p), maxCaptured)
	}
	for i, item := range p {
		if item == "*" {
			all = true
			continue
		}
		r, err := parseRange(item)
		if err != nil {
			return nil, false, fmt.Errorf("[%d]: %w", i, err)
		}
		ranges = append(ranges, r)
	}
	slices.SortFunc(ranges, func(a, b PortRange) int { return int(a.First) - int(b.First) })
	merged := ranges[:0]
	for _, r := range ranges {
		if n := len(merged); n > 0 && int(r.First) <= int(merged[n-1].Last)+1 {
			merged[n-1].Last = max(merged[n-1].Last, r.Last)
			continue
		}
		merged = append(merged, r)
	}
	return merged, all, nil
}

func parseRange(item string) (PortRange, error) {
	first, last, isRange := strings.Cut(item, "-")
	if !isRange {
		last = first
	}
	a, aErr := strconv.ParseUint(first, 10, 16)
	b, bErr := strconv.ParseUint(last, 10, 16)
	if aErr != nil || bErr != nil || a == 0 || a > b {
		return PortRange{}, fmt.Errorf(`%q is no port: give a number, a range such as "9000-9010", or "*"`, item)
	}
	return PortRange{uint16(a), uint16(b)}, nil
}

// ParseIPRanges reads addresses and ranges of either family; all says that "*" was among them.
func ParseIPRanges(list []string) (ranges []netip.Prefix, all bool, err error) {
	if len(list) > maxCaptured {
		return nil, false, fmt.Errorf("%d items, at most %d are taken", len(list), maxCaptured)
	}
	for i, item := range list {
		if item == "*" {
			all = true
			continue
		}
		prefix, err := netip.ParsePrefix(item)
		if addr, aErr := netip.ParseAddr(item); aErr == nil {
			prefix, err = netip.PrefixFrom(addr, addr.BitLen()), nil
		}
		if err != nil || prefix.Addr().Is4In6() || prefix.Addr().Zone() != "" {
			return nil, false, fmt.Errorf(`[%d]: %q is no address range: give one such as "10.0.0.0/8", or "*"`, i, item)
		}
		ranges = append(ranges, prefix.Masked())
	}
	return ranges, all, nil
}

func (c *Capture) validate() error {
	setDefault(&c.UID, ProxyUID)
	switch {
	case c.Inbound == 0 && c.Outbound == 0:
		return errors.New("inbound, outbound: at least one port is needed")
	case c.Inbound == c.Outbound:
		return fmt.Errorf("outbound: %d is the inbound port", c.Outbound)
	}
	for _, list := range []struct {
		field string
		ports PortList
	}{
		{"includeInboundPorts", c.IncludeInboundPorts}, {"excludeInboundPorts", c.ExcludeInboundPorts},
		{"includeOutboundPorts", c.IncludeOutboundPorts}, {"excludeOutboundPorts", c.ExcludeOutboundPorts},
	} {
		if _, _, err := list.ports.Ranges(); err != nil {
			return fmt.Errorf("%s%w", list.field, below(err))
		}
	}
	if _, _, err := ParseIPRanges(c.IncludeOutboundIPRanges); err != nil {
		return fmt.Errorf("includeOutboundIPRanges%w", below(err))
	}
	if _, all, err := ParseIPRanges(c.ExcludeOutboundIPRanges); err != nil {
		return fmt.Errorf("excludeOutboundIPRanges%w", below(err))
	} else if all {
		return errors.New(`excludeOutboundIPRanges: "*" would leave nothing; set outbound to 0`)
	}
	return nil
}

// below joins an error to the name of its field: "[1]: ..." or ": ...".
func below(err error) error {
	if strings.HasPrefix(err.Error(), "[") {
		return err
	}
	return fmt.Errorf(": %w", err)
}
