package capture

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// assign gives lo an IPv6 address, without which nothing can be sent from it. Of
// IPv4 all of 127.0.0.0/8 is there from the start.
func assign(addr netip.Addr) error {
	err := address(addr, unix.RTM_NEWADDR, netlink.Create|netlink.Replace)
	if errors.Is(err, unix.EEXIST) {
		return nil
	}
	return err
}

// unassign takes it away, if it is there.
func unassign(addr netip.Addr) error {
	err := address(addr, unix.RTM_DELADDR, 0)
	if errors.Is(err, unix.EADDRNOTAVAIL) {
		return nil
	}
	return err
}

// address sends one rtnetlink message about an address of lo (rtnetlink(7)).
func address(addr netip.Addr, kind netlink.HeaderType, flags netlink.HeaderFlags) error {
	lo, err := net.InterfaceByName("lo")
	if err != nil {
		return err
	}
	attributes, err := netlink.MarshalAttributes([]netlink.Attribute{
		{Type: unix.IFA_LOCAL, Data: addr.AsSlice()}, {Type: unix.IFA_ADDRESS, Data: addr.AsSlice()},
	})
	if err != nil {
		return err
	}
	conn, err := netlink.Dial(unix.NETLINK_ROUTE, nil)
	if err != nil {
		return err
	}
	// struct ifaddrmsg: family, prefix length, flags, scope, index.
	message := []byte{unix.AF_INET6, uint8(addr.BitLen()), unix.IFA_F_NODAD, unix.RT_SCOPE_HOST}
	message = binary.NativeEndian.AppendUint32(message, uint32(lo.Index))
	_, err = conn.Execute(netlink.Message{
		Header: netlink.Header{Type: kind, Flags: netlink.Request | netlink.Acknowledge | flags},
		Data:   append(message, attributes...),
	})
	if err != nil {
		_ = conn.Close()
		return fmt.Errorf("rtnetlink: %w", err)
	}
	return conn.Close()
}
