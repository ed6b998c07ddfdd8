// Package netnstest makes network namespaces for tests: small hosts with a kernel
// network stack of their own, joined by virtual cables, from which nothing leaves
// the machine.
//
// It assumes root and iproute2. Where these are missing, tests that need it fail on
// CI, and are skipped elsewhere with the reason.
package netnstest

import (
	"crypto/rand"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// NS is one namespace. It ends with its test.
type NS struct {
	t    testing.TB
	name string
	fd   int
}

// prefix begins the names of namespaces.
const prefix = "castellan-test-"

// New makes a namespace in which only loopback is up.
func New(t testing.TB) *NS {
	t.Helper()
	need(t)
	n := &NS{t: t, name: prefix + strings.ToLower(rand.Text()[:12])}
	run(t, "ip", "netns", "add", n.name)
	var err error
	if n.fd, err = unix.Open("/run/netns/"+n.name, unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = unix.Close(n.fd)
		run(t, "ip", "netns", "del", n.name)
	})
	n.IP("link", "set", "lo", "up")
	return n
}

// need ends the test where namespaces cannot be made.
func need(t testing.TB) {
	t.Helper()
	_, err := exec.LookPath("ip")
	switch {
	case err == nil && os.Geteuid() == 0:
	case os.Getenv("CI") == "true":
		t.Fatalf("network namespaces need root and iproute2 (uid %d, %v)", os.Geteuid(), err)
	default:
		t.Skipf("network namespaces need root and iproute2 (uid %d, %v)", os.Geteuid(), err)
	}
}

func run(t testing.TB, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
}

// IP runs ip(8) with the namespace as its own.
func (n *NS) IP(args ...string) {
	n.t.Helper()
	run(n.t, "ip", append([]string{"-n", n.name}, args...)...)
}

// Join lays a cable from a to b, with an interface eth0 at each end, and gives
// these the addresses, such as "10.0.0.1/24".
func Join(a, b *NS, aAddresses, bAddresses []string) {
	a.t.Helper()
	a.IP("link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", b.name)
	for n, addresses := range map[*NS][]string{a: aAddresses, b: bAddresses} {
		n.address("eth0", addresses)
		n.IP("link", "set", "eth0", "up")
	}
}

// Bridge turns a namespace into a switch with an address of its own, to which
// others are plugged in.
func (n *NS) Bridge(addresses ...string) {
	n.t.Helper()
	n.IP("link", "add", "br0", "type", "bridge")
	n.IP("link", "set", "br0", "up")
	n.address("br0", addresses)
}

// Plug gives a namespace an interface eth0 with these addresses, and a cable from
// there to the switch.
func (n *NS) Plug(into *NS, addresses ...string) {
	n.t.Helper()
	port := "p" + strings.TrimPrefix(n.name, prefix)[:10]
	n.IP("link", "add", "eth0", "type", "veth", "peer", "name", port, "netns", into.name)
	into.IP("link", "set", port, "master", "br0", "up")
	n.IP("link", "set", "eth0", "up")
	n.address("eth0", addresses)
}

// address gives an interface addresses, usable at once.
func (n *NS) address(link string, addresses []string) {
	n.t.Helper()
	for _, addr := range addresses {
		if strings.Contains(addr, ":") {
			n.IP("addr", "add", addr, "dev", link, "nodad")
		} else {
			n.IP("addr", "add", addr, "dev", link)
		}
	}
}

// Do runs f in the namespace: sockets that f itself opens are the namespace's, and
// so are processes that it starts. Other goroutines are where they were.
func (n *NS) Do(f func()) {
	n.t.Helper()
	done := make(chan error, 1)
	go func() {
		// Never unlocked, so the thread ends with the goroutine.
		runtime.LockOSThread()
		if err := unix.Setns(n.fd, unix.CLONE_NEWNET); err != nil {
			done <- err
			return
		}
		defer close(done)
		f()
	}()
	if err := <-done; err != nil {
		n.t.Fatalf("entering %s: %v", n.name, err)
	}
}

// Listen listens at an address of the namespace, of its family alone, until the
// test ends.
func (n *NS) Listen(addr string) net.Listener {
	n.t.Helper()
	var l net.Listener
	var err error
	network := "tcp4"
	if strings.HasPrefix(addr, "[") {
		network = "tcp6"
	}
	n.Do(func() { l, err = net.Listen(network, addr) })
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { l.Close() })
	return l
}

// Dial connects from within the namespace to an IP address and port.
func (n *NS) Dial(d net.Dialer, addr string) (c net.Conn, err error) {
	n.Do(func() { c, err = d.Dial("tcp", addr) })
	return c, err
}

// DialAs does the same as another user of the machine: its packets are that uid's.
func (n *NS) DialAs(uid int, d net.Dialer, addr string) (c net.Conn, err error) {
	n.Do(func() {
		// Of this thread only, which ends.
		if _, _, errno := unix.RawSyscall(unix.SYS_SETFSUID, uintptr(uid), 0, 0); errno != 0 {
			err = errno
			return
		}
		c, err = d.Dial("tcp", addr)
	})
	return c, err
}

// Start starts a process in the namespace.
func (n *NS) Start(cmd *exec.Cmd) error {
	var err error
	n.Do(func() { err = cmd.Start() })
	return err
}

// Sysctl sets one of the namespace's settings below /proc/sys/net.
func (n *NS) Sysctl(name string, value int) {
	n.t.Helper()
	var err error
	n.Do(func() { err = os.WriteFile("/proc/sys/net/"+name, []byte(strconv.Itoa(value)), 0o600) })
	if err != nil {
		n.t.Fatal(err)
	}
}

// Output runs a program of the machine in the namespace and returns what it says.
func (n *NS) Output(name string, args ...string) string {
	n.t.Helper()
	var out []byte
	var err error
	n.Do(func() { out, err = exec.Command(name, args...).CombinedOutput() })
	if err != nil {
		n.t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}
