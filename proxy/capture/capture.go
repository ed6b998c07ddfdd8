// Package capture has the kernel redirect a pod's TCP traffic to its proxy: what
// comes in to the inbound port, what goes out to the outbound port, by nftables
// programmed over netlink.
//
// It never captures the proxy's own traffic, loopback, what the configuration
// excludes, the proxy's own ports, nor UDP. All rules go in with one transaction,
// in place of those of an earlier run; they are read back, and tried out where a
// connection can be. It fails closed: an error means that the pod must not start,
// and where IPv6 is on, rules for it are not optional.
//
// It assumes CAP_NET_ADMIN in the pod's network namespace, and that nothing else
// there alters the tables named castellan. Processes of the proxy's uid, or with
// rights over the network, can go around it: it serves the applications of a pod
// and does not confine them. What is owed to others is enforced where they accept.
package capture

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"strings"

	"github.com/google/nftables"

	"castellan.dev/internal/config"
)

// The sources of the proxy's connections to its own pod's application, by which
// they are told from others and not captured again. They are Istio's.
var (
	AppSource4 = netip.AddrFrom4([4]byte{127, 0, 0, 6})
	AppSource6 = netip.AddrFrom16([16]byte{15: 6})
)

// Capture is what is to be redirected.
type Capture struct {
	plan plan
	log  *slog.Logger
}

// New reads what a proxy's validated configuration captures.
func New(cfg config.Proxy, log *slog.Logger) (*Capture, error) {
	if cfg.Capture == nil {
		return nil, errors.New("capture: the configuration has none")
	}
	p, err := newPlan(cfg)
	if err != nil {
		return nil, fmt.Errorf("capture.%w", err)
	}
	return &Capture{plan: p, log: log}, nil
}

// Apply redirects, in place of whatever an earlier Apply redirected.
func (c *Capture) Apply(ctx context.Context) error {
	on, err := ipv6On()
	if err != nil {
		return fmt.Errorf("capture: %w", err)
	}
	families := []family{ipv4}
	if on {
		families = append(families, ipv6)
	}
	programs := make([]*program, 0, len(families))
	for _, f := range families {
		programs = append(programs, c.plan.compile(f))
	}
	if err := install(programs); err != nil {
		return fmt.Errorf("capture: programming nftables (CAP_NET_ADMIN is needed): %w", err)
	}
	if on && c.plan.inbound != 0 {
		if err := assign(AppSource6); err != nil {
			return fmt.Errorf("capture: assigning %s to lo: %w", AppSource6, err)
		}
	}
	for _, p := range programs {
		if err := verify(p); err != nil {
			return fmt.Errorf("capture: reading back: %w", err)
		}
	}
	for _, f := range families {
		result, err := c.plan.try(ctx, f)
		if err != nil {
			return fmt.Errorf("capture: %s: %w", f.name, err)
		}
		c.log.Info("capturing", "family", f.name, "inbound", c.plan.inbound, "outbound", c.plan.outbound, "trial", result)
	}
	return nil
}

// Undo leaves nothing of what Apply did. Without any of it, it does nothing.
func Undo() error {
	if err := remove(); err != nil {
		return fmt.Errorf("capture: removing nftables' tables (CAP_NET_ADMIN is needed): %w", err)
	}
	on, err := ipv6On()
	if err != nil {
		return fmt.Errorf("capture: %w", err)
	}
	if !on {
		return nil
	}
	if err := unassign(AppSource6); err != nil {
		return fmt.Errorf("capture: taking %s from lo: %w", AppSource6, err)
	}
	return nil
}

// family is one of IPv4 and IPv6.
type family struct {
	name string
	nft  nftables.TableFamily
	// addr is the length of an address, source and destination where they are in
	// the header.
	addr, source, destination uint32
	appSource                 netip.Addr
	addressType               nftables.SetDatatype
}

var (
	ipv4 = family{
		name: "IPv4", nft: nftables.TableFamilyIPv4, addr: 4, source: 12, destination: 16,
		appSource: AppSource4, addressType: nftables.TypeIPAddr,
	}
	ipv6 = family{
		name: "IPv6", nft: nftables.TableFamilyIPv6, addr: 16, source: 8, destination: 24,
		appSource: AppSource6, addressType: nftables.TypeIP6Addr,
	}
)

// ipv6On reports whether the namespace has IPv6: the kernel does, and it is not
// switched off for every interface.
func ipv6On() (bool, error) {
	addresses, err := os.ReadFile("/proc/thread-self/net/if_inet6")
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil || len(addresses) > 0 {
		return true, err
	}
	off, err := os.ReadFile("/proc/sys/net/ipv6/conf/all/disable_ipv6")
	if err != nil {
		return true, nil //nolint:nilerr // whether it is off cannot be seen: it counts as on, and has to be captured
	}
	return strings.TrimSpace(string(off)) != "1", nil
}
