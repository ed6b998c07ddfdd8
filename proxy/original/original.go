// Package original asks the kernel where a connection was going before it was
// redirected here.
//
// It refuses connections of which the kernel does not know that: who connected to
// the redirection's own port has no other destination. It assumes the redirection
// was made by netfilter in the network namespace that the connection was accepted
// in, where connection tracking remembers it.
package original

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"golang.org/x/sys/unix"
)

// soOriginalDst is SO_ORIGINAL_DST and IP6T_SO_ORIGINAL_DST (linux/netfilter_ipv4.h,
// linux/netfilter_ipv6/ip6_tables.h).
const soOriginalDst = 80

// Destination returns the address that conn's peer meant to reach.
func Destination(conn net.Conn) (netip.AddrPort, error) {
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		return netip.AddrPort{}, fmt.Errorf("original destination: %T has none", conn)
	}
	local, ok := tcp.LocalAddr().(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}, errors.New("original destination: connection is closed")
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("original destination: %w", err)
	}
	var dst netip.AddrPort
	var optErr error
	ask := ipv6
	if local.IP.To4() != nil {
		ask = ipv4
	}
	if err := raw.Control(func(fd uintptr) { dst, optErr = ask(int(fd)) }); err != nil {
		return netip.AddrPort{}, fmt.Errorf("original destination: %w", err)
	}
	if optErr != nil {
		return netip.AddrPort{}, fmt.Errorf("original destination: %w", optErr)
	}
	return dst, nil
}

// ipv4 reads a struct sockaddr_in, by way of an option type that is long enough.
func ipv4(fd int) (netip.AddrPort, error) {
	o, err := unix.GetsockoptIPv6Mreq(fd, unix.IPPROTO_IP, soOriginalDst)
	if err != nil {
		return netip.AddrPort{}, err
	}
	b := o.Multiaddr
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:8])), binary.BigEndian.Uint16(b[2:4])), nil
}

// ipv6 reads a struct sockaddr_in6. The scope of a link-local address is left out.
func ipv6(fd int) (netip.AddrPort, error) {
	o, err := unix.GetsockoptIPv6MTUInfo(fd, unix.IPPROTO_IPV6, soOriginalDst)
	if err != nil {
		return netip.AddrPort{}, err
	}
	var port [2]byte
	binary.NativeEndian.PutUint16(port[:], o.Addr.Port) // kept in network order
	return netip.AddrPortFrom(netip.AddrFrom16(o.Addr.Addr), binary.BigEndian.Uint16(port[:])), nil
}
