package daemon

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"

	"castellan.dev/certs-test/cluster/internal/layout"
)

// connect joins the nodes to a bridge in the daemon's own network namespace. No
// namespace gets a default route: nothing can leave.
func connect(nodes []*node) error {
	control := []string{
		"link set lo up",
		"link add br0 type bridge",
		"addr add " + layout.Control4 + "/24 dev br0",
		"addr add " + layout.Control6 + "/64 dev br0 nodad",
		"link set br0 up",
	}
	for _, n := range nodes {
		control = append(control,
			fmt.Sprintf("link add %s type veth peer name eth0 netns %d", n.Name, n.pid),
			fmt.Sprintf("link set %s master br0 up", n.Name),
			fmt.Sprintf("route add %s via %s", n.Pods4, n.IP4),
			fmt.Sprintf("-6 route add %s via %s", n.Pods6, n.IP6),
		)
	}
	if err := batch(control, "ip"); err != nil {
		return err
	}
	for _, n := range nodes {
		commands := []string{
			"link set lo up",
			"addr add " + n.IP4 + "/24 dev eth0",
			"addr add " + n.IP6 + "/64 dev eth0 nodad",
			"link set eth0 up",
			// Without a route, connect() to a service fails before the rules of
			// kube-proxy see it.
			"route add " + layout.Services4 + " dev eth0",
			"-6 route add " + layout.Services6 + " dev eth0",
		}
		for _, other := range nodes {
			if other != n {
				commands = append(commands, "route add "+other.Pods4+" via "+other.IP4, "-6 route add "+other.Pods6+" via "+other.IP6)
			}
		}
		if err := batch(commands, n.inside("ip")...); err != nil {
			return fmt.Errorf("network of %s: %w", n.Name, err)
		}
	}
	return nil
}

// batch runs ip's commands one after the other; `ip -batch` takes no -6 per line.
func batch(commands []string, ip ...string) error {
	for _, c := range commands {
		args := append(append([]string{}, ip...), strings.Fields(c)...)
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			return fmt.Errorf("ip %s: %w: %s", c, err, out)
		}
	}
	return nil
}

// forward answers on a listener that was opened outside the namespaces, and is
// therefore reached from there, with connections to an address inside.
func forward(listener net.Listener, address string) {
	for {
		outside, err := listener.Accept()
		if err != nil {
			fmt.Fprintf(os.Stderr, "forwarding ended: %v\n", err)
			return
		}
		go func() {
			defer outside.Close()
			inside, err := net.Dial("tcp", address)
			if err != nil {
				return // the API server is down: its clients see a closed connection
			}
			defer inside.Close()
			splice(outside, inside)
		}()
	}
}

func splice(a, b net.Conn) {
	var both sync.WaitGroup
	for _, pair := range [][2]net.Conn{{a, b}, {b, a}} {
		both.Go(func() {
			_, _ = io.Copy(pair[0], pair[1])
			if half, ok := pair[0].(*net.TCPConn); ok {
				_ = half.CloseWrite()
			}
		})
	}
	both.Wait()
}

func hostPort(host string, port int) string { return net.JoinHostPort(host, strconv.Itoa(port)) }
