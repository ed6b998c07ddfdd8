package capture_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"castellan.dev/internal/config"
	"castellan.dev/proxy/capture"
	"castellan.dev/proxy/capture/netnstest"
	"castellan.dev/proxy/original"
)

// TestMain is also the init step of a pod: a process of its own, in the pod's
// namespace, that may do nothing else to the machine.
func TestMain(m *testing.M) {
	if os.Getenv("CAPTURE_CHILD") == "" {
		goleak.VerifyTestMain(m)
		return
	}
	if err := child(os.Getenv("CAPTURE_CHILD")); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func child(what string) error {
	capability := uint32(1 << unix.CAP_NET_ADMIN)
	if what == "weak" {
		capability = 1 << unix.CAP_NET_RAW
	}
	data := [2]unix.CapUserData{{Effective: capability, Permitted: capability}}
	if err := unix.Capset(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &data[0]); err != nil {
		return err
	}
	if what == "undo" {
		return capture.Undo()
	}
	var cfg config.Proxy
	if err := config.LoadEnv("CAPTURE_CONFIG", &cfg); err != nil {
		return err
	}
	c, err := capture.New(cfg, slog.New(slog.NewTextHandler(os.Stderr, nil)))
	if err != nil {
		return err
	}
	return c.Apply(context.Background())
}

const (
	in, out = 15006, 15001
	proxy   = config.ProxyUID
)

// settings are a capture's, as JSON, in a whole configuration.
func settings(t testing.TB, captured string) string {
	t.Helper()
	doc := map[string]any{
		"apiVersion": config.APIVersion, "kind": "ProxyConfig", "agentSocket": "/s", "ready": ":15021",
		"capture": json.RawMessage(captured),
	}
	b, err := json.Marshal(doc)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

const everything = `{"inbound": 15006, "outbound": 15001}`

// initStep runs the step in the namespace and returns what it says.
func initStep(t testing.TB, n *netnstest.NS, what, captured string) (string, error) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "GORACE=atexit_sleep_ms=0", "CAPTURE_CHILD="+what, "CAPTURE_CONFIG="+settings(t, captured))
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := n.Start(cmd); err != nil {
		t.Fatal(err)
	}
	err := cmd.Wait()
	return said.String(), err
}

func apply(t testing.TB, n *netnstest.NS, captured string) string {
	t.Helper()
	said, err := initStep(t, n, "apply", captured)
	if err != nil {
		t.Fatalf("%v\n%s", err, said)
	}
	return said
}

// pod is a namespace with both families, captured, and a peer next to it.
type pod struct {
	*netnstest.NS
	t    *testing.T
	peer *netnstest.NS
}

const (
	pod4, peer4 = "10.9.0.2", "10.9.0.1"
	pod6, peer6 = "fd09::2", "fd09::1"
)

func newPod(t *testing.T) *pod {
	t.Helper()
	p := &pod{NS: netnstest.New(t), t: t, peer: netnstest.New(t)}
	netnstest.Join(p.NS, p.peer, []string{pod4 + "/24", pod6 + "/64"}, []string{peer4 + "/24", peer6 + "/64"})
	p.IP("route", "add", "default", "via", peer4)
	p.IP("-6", "route", "add", "default", "via", peer6)
	// The peer stands for everybody else, and refuses at once what it does not serve.
	p.peer.IP("route", "add", "local", "default", "dev", "lo", "table", "main")
	p.peer.IP("-6", "route", "add", "local", "default", "dev", "lo", "table", "main")
	return p
}

// arrival is where a connection came out, and where it had been going.
type arrival struct {
	at       netip.AddrPort
	original netip.AddrPort
	err      error
}

// listeners accept on addresses of a namespace; what arrives is told on the channel.
func listeners(n *netnstest.NS, addrs ...string) <-chan arrival {
	arrived := make(chan arrival, 100)
	for _, addr := range addrs {
		l := n.Listen(addr)
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				dst, err := original.Destination(c)
				local := c.LocalAddr().(*net.TCPAddr).AddrPort()
				arrived <- arrival{netip.AddrPortFrom(local.Addr().Unmap(), local.Port()), dst, err}
				c.Close()
			}
		}()
	}
	return arrived
}

// proxys are the listeners a proxy would have.
func (p *pod) proxys() <-chan arrival {
	return listeners(p.NS, "0.0.0.0:15006", "[::]:15006", "127.0.0.1:15001", "[::1]:15001")
}

// reach connects and says which port answered; 0 when none did.
func reach(t *testing.T, n *netnstest.NS, uid int, from, to string, arrived <-chan arrival) arrival {
	t.Helper()
	d := net.Dialer{Timeout: 2 * time.Second}
	if from != "" {
		d.LocalAddr = &net.TCPAddr{IP: net.ParseIP(from)}
	}
	c, err := n.DialAs(uid, d, to)
	if err != nil {
		return arrival{}
	}
	defer c.Close()
	select {
	case a := <-arrived:
		return a
	case <-time.After(20 * time.Second):
		t.Fatalf("a connection to %s was accepted by somebody else", to)
		return arrival{}
	}
}

// both runs f for each family with the pod's and its peer's address.
func both(t *testing.T, f func(t *testing.T, pod, peer, source string)) {
	t.Run("IPv4", func(t *testing.T) { f(t, pod4, peer4, "127.0.0.6") })
	t.Run("IPv6", func(t *testing.T) { f(t, pod6, peer6, "::6") })
}

func addr(host string, port int) string { return net.JoinHostPort(host, fmt.Sprint(port)) }

func TestRedirects(t *testing.T) {
	p := newPod(t)
	if said := apply(t, p.NS, everything); strings.Count(said, "trial=redirected") != 2 {
		t.Errorf("the rules were not tried out: %s", said)
	}
	arrived := p.proxys()
	check := func(t *testing.T, what string, n *netnstest.NS, uid int, from, to string, port uint16) {
		t.Helper()
		got := reach(t, n, uid, from, to, arrived)
		if got.at.Port() != port || port != 0 && (got.err != nil || got.original.String() != to) {
			t.Errorf("%s: to %s came out at %+v, want port %d", what, to, got, port)
		}
	}
	both(t, func(t *testing.T, pod, peer, source string) {
		check(t, "from outside", p.peer, 0, "", addr(pod, 8080), in)
		check(t, "from outside, to the outbound port", p.peer, 0, "", addr(pod, out), in)
		check(t, "from outside, to the inbound port itself", p.peer, 0, "", addr(pod, in), in)
		check(t, "from an application", p.NS, 1000, "", addr(peer, 80), out)
		check(t, "from root", p.NS, 0, "", addr(peer, 80), out)
		check(t, "from an application, elsewhere", p.NS, 1000, "", addr(map[bool]string{true: "198.51.100.7", false: "2001:db8:7::1"}[source == "127.0.0.6"], 443), out)
		check(t, "from the proxy to its own pod", p.NS, proxy, "", addr(pod, 8080), in)
		check(t, "from the proxy to its application, unheard", p.NS, proxy, source, addr(pod, 8080), 0)
		check(t, "from the proxy to others", p.NS, proxy, "", addr(peer, 80), 0)
		check(t, "within the pod, by its address", p.NS, 1000, "", addr(pod, 8080), 0)
	})
	// With the application there, the exceptions reach it.
	app := listeners(p.NS, "0.0.0.0:8080", "[::]:8080", "0.0.0.0:15020", "[::]:15021")
	other := listeners(p.peer, "0.0.0.0:80", "[::]:80")
	met := func(t *testing.T, what string, n *netnstest.NS, uid int, from, to string, arrived <-chan arrival) {
		t.Helper()
		if got := reach(t, n, uid, from, to, arrived); got.at.String() != to {
			t.Errorf("%s: to %s came out at %+v", what, to, got)
		}
	}
	both(t, func(t *testing.T, pod, peer, source string) {
		loopback := map[bool]string{true: "127.0.0.1", false: "::1"}[source == "127.0.0.6"]
		met(t, "from the proxy to its application", p.NS, proxy, source, addr(pod, 8080), app)
		met(t, "within the pod, by its address", p.NS, 1000, "", addr(pod, 8080), app)
		met(t, "within the pod, by loopback", p.NS, 1000, "", addr(loopback, 8080), app)
		met(t, "from the proxy by loopback", p.NS, proxy, "", addr(loopback, 8080), app)
		met(t, "from the proxy to others", p.NS, proxy, "", addr(peer, 80), other)
		own := map[bool]int{true: 15020, false: 15021}[source == "127.0.0.6"]
		met(t, "to the proxy's own port", p.peer, 0, "", addr(pod, own), app)
		met(t, "from the proxy to its own port", p.NS, proxy, "", addr(pod, own), app)
	})
	// Who is redirected from loopback addresses has not come from outside.
	if c, err := p.peer.Dial(net.Dialer{Timeout: 300 * time.Millisecond}, addr("127.0.0.1", out)); err == nil {
		c.Close()
		t.Error("the pod's loopback answers from outside")
	}
}

func TestLists(t *testing.T) {
	for name, tt := range map[string]struct {
		captured string
		// inbound and outbound: to which port, and whether it is captured.
		inbound, outbound map[string]bool
	}{
		"excluded": {
			`{"inbound": 15006, "outbound": 15001, "excludeInboundPorts": ["22", "9000-9010"], "excludeOutboundPorts": ["3306"],
			  "excludeOutboundIPRanges": ["198.51.100.0/24", "2001:db8:7::/48", "10.9.0.1/32", "fd09::1"]}`,
			map[string]bool{"22": false, "23": true, "8999": true, "9000": false, "9005": false, "9010": false, "9011": true},
			map[string]bool{
				"203.0.113.1:3306": false, "203.0.113.1:3307": true, "198.51.100.1:80": false, "198.51.101.0:80": true, "198.51.99.255:80": true,
				"[2001:db8:8::1]:80": true, "[2001:db8:7::1]:80": false, "[2001:db8:8::1]:3306": false, "10.9.0.1:80": false, "[fd09::1]:80": false,
			},
		},
		"included": {
			`{"inbound": 15006, "outbound": 15001, "includeInboundPorts": ["8080", "65535"], "excludeInboundPorts": ["65535"],
			  "includeOutboundPorts": ["25"], "includeOutboundIPRanges": ["198.51.100.0/24", "198.51.101.0/24"], "excludeOutboundIPRanges": ["198.51.100.9"]}`,
			map[string]bool{"8080": true, "8081": false, "65535": false, "1": false},
			map[string]bool{
				"198.51.100.1:80": true, "198.51.101.255:80": true, "198.51.102.0:80": false, "198.51.100.9:80": false, "198.51.100.9:25": true,
				"203.0.113.1:25": true, "203.0.113.1:80": false, "[2001:db8:8::1]:80": false, "[2001:db8:8::1]:25": true,
			},
		},
		"ports alone": {
			`{"inbound": 15006, "outbound": 15001, "includeInboundPorts": "*", "includeOutboundPorts": ["443-65535"]}`,
			map[string]bool{"1": true, "65535": true},
			map[string]bool{"203.0.113.1:443": true, "203.0.113.1:442": false, "203.0.113.1:65535": true, "[2001:db8:8::1]:8443": true},
		},
		"every port": {
			`{"inbound": 15006, "outbound": 15001, "includeOutboundPorts": ["*"], "excludeOutboundPorts": [53], "excludeOutboundIPRanges": ["203.0.113.0/24"]}`,
			nil, map[string]bool{"203.0.113.1:1": true, "203.0.113.1:65535": true, "203.0.113.1:53": false},
		},
		"inbound alone":  {`{"inbound": 15006}`, map[string]bool{"80": true}, map[string]bool{"203.0.113.1:443": false}},
		"outbound alone": {`{"outbound": 15001}`, map[string]bool{"80": false}, map[string]bool{"203.0.113.1:443": true, "[2001:db8:8::1]:443": true}},
		"all excluded":   {`{"inbound": 15006, "outbound": 15001, "excludeInboundPorts": "*", "excludeOutboundPorts": "*"}`, map[string]bool{"80": false}, map[string]bool{"203.0.113.1:443": false}},
		"ends of addresses": {
			`{"outbound": 15001, "includeOutboundIPRanges": ["0.0.0.0/1", "255.255.255.255", "::/1", "ffff::/16"]}`, nil,
			map[string]bool{"127.255.255.255:80": false, "1.2.3.4:80": true, "128.0.0.1:80": false, "[2001:db8::1]:80": true, "[fd09::1]:80": false},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newPod(t)
			apply(t, p.NS, tt.captured)
			arrived := p.proxys()
			for port, want := range tt.inbound {
				for _, host := range []string{pod4, pod6} {
					to := net.JoinHostPort(host, port)
					if got := reach(t, p.peer, 0, "", to, arrived); (got.at.Port() == in) != want {
						t.Errorf("inbound %s: %+v, captured should be %t", to, got, want)
					}
				}
			}
			for to, want := range tt.outbound {
				if got := reach(t, p.NS, 1000, "", to, arrived); (got.at.Port() == out) != want {
					t.Errorf("outbound %s: %+v, captured should be %t", to, got, want)
				}
			}
		})
	}
}

// A second run leaves what the first one would have, whatever it was; undone,
// nothing is left.
func TestAgainAndUndone(t *testing.T) {
	p := newPod(t)
	before := p.Output("nft", "list", "ruleset") + p.Output("ip", "addr", "show", "dev", "lo")
	apply(t, p.NS, everything)
	first := p.Output("nft", "list", "ruleset") + p.Output("ip", "addr", "show", "dev", "lo")
	apply(t, p.NS, `{"inbound": 15006, "outbound": 15001, "excludeInboundPorts": ["1-9"], "includeOutboundIPRanges": ["10.0.0.0/8"]}`)
	if second := p.Output("nft", "list", "ruleset"); !strings.Contains(second, "10.0.0.0/8") {
		t.Errorf("another configuration is not in force:\n%s", second)
	}
	apply(t, p.NS, everything)
	if again := p.Output("nft", "list", "ruleset") + p.Output("ip", "addr", "show", "dev", "lo"); again != first {
		t.Errorf("once:\n%s\nagain:\n%s", first, again)
	}
	p.Output("nft", "add", "table", "ip", "somebody")
	for range 2 {
		if said, err := initStep(t, p.NS, "undo", everything); err != nil {
			t.Fatalf("%v\n%s", err, said)
		}
	}
	if after := p.Output("nft", "list", "ruleset") + p.Output("ip", "addr", "show", "dev", "lo"); after != "table ip somebody {\n}\n"+before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

// Lists as long as they may be, which take more than one message to the kernel.
func TestLongLists(t *testing.T) {
	p := newPod(t)
	ports, addresses := make([]string, 1024), make([]string, 1024)
	for i := range ports {
		ports[i] = fmt.Sprintf("%q", fmt.Sprint(10000+2*i))
		addresses[i] = fmt.Sprintf("%q", fmt.Sprintf("10.%d.%d.0/25", 16+i/256, i%256))
	}
	for i := range 512 {
		addresses[i] = fmt.Sprintf("%q", fmt.Sprintf("2001:db8:%x::/64", 2*i))
	}
	apply(t, p.NS, fmt.Sprintf(`{"inbound": 15006, "outbound": 15001, "excludeInboundPorts": [%s], "excludeOutboundIPRanges": [%s]}`,
		strings.Join(ports, ","), strings.Join(addresses, ",")))
	if got := p.Output("nft", "list", "set", "ip", "castellan", "inbound_excluded"); !strings.Contains(got, "12044") || !strings.Contains(got, "15021") {
		t.Errorf("%s", got)
	}
	if got := p.Output("nft", "list", "set", "ip6", "castellan", "addresses_excluded"); strings.Count(got, "/64") != 512 {
		t.Errorf("%s", got)
	}
}

// A pod without IPv6 has no rules for it; one that has it, however little, does.
func TestFamilies(t *testing.T) {
	n := netnstest.New(t)
	n.Sysctl("ipv6/conf/all/disable_ipv6", 1)
	if said := apply(t, n, everything); strings.Contains(said, "IPv6") || !strings.Contains(said, `trial="no route to try"`) {
		t.Errorf("%s", said)
	}
	if got := n.Output("nft", "list", "tables"); got != "table ip castellan\n" {
		t.Errorf("%s", got)
	}
	n.Sysctl("ipv6/conf/all/disable_ipv6", 0)
	apply(t, n, everything)
	if got := n.Output("nft", "list", "tables"); got != "table ip castellan\ntable ip6 castellan\n" {
		t.Errorf("%s", got)
	}
}

// What cannot be programmed is an error: the pod must not start without it. And
// nothing is half done.
func TestFailsClosed(t *testing.T) {
	p := newPod(t)
	said, err := initStep(t, p.NS, "weak", everything)
	if err == nil || !strings.Contains(said, "programming nftables (CAP_NET_ADMIN is needed)") {
		t.Errorf("%v: %s", err, said)
	}
	// A table of that name that cannot be replaced: another family's rules are not
	// put in either.
	apply(t, p.NS, everything)
	before := p.Output("nft", "list", "ruleset")
	said, err = initStep(t, p.NS, "weak", `{"inbound": 15006}`)
	if after := p.Output("nft", "list", "ruleset"); err == nil || after != before {
		t.Errorf("%v: %s\n%s", err, said, after)
	}
	// Rules of others that take the traffic first are found by trying.
	q := newPod(t)
	q.Output("nft", "add", "table", "ip", "other")
	q.Output("nft", "add", "chain", "ip", "other", "output", "{ type nat hook output priority -101; }")
	q.Output("nft", "add", "rule", "ip", "other", "output", "tcp", "dport", "65000", "redirect", "to", ":9")
	said, err = initStep(t, q.NS, "apply", everything)
	if err == nil || !strings.Contains(said, "IPv4: a connection to 192.0.2.1:65000 was not redirected to port 15001") {
		t.Errorf("%v: %s", err, said)
	}
}

// The rules do not need the proxy: a second run beside it changes nothing for it.
func TestBesideTheProxy(t *testing.T) {
	p := newPod(t)
	apply(t, p.NS, everything)
	arrived := p.proxys()
	if said := apply(t, p.NS, everything); strings.Count(said, `trial="the proxy runs already"`) != 2 {
		t.Errorf("%s", said)
	}
	if got := reach(t, p.peer, 0, "", addr(pod4, 80), arrived); got.at.Port() != in {
		t.Errorf("%+v", got)
	}
}

// Of a connection that nothing redirected, the kernel knows no other destination
// or none at all.
func TestNotRedirected(t *testing.T) {
	p := newPod(t)
	arrived := listeners(p.NS, "0.0.0.0:15006", "[::]:15006")
	both(t, func(t *testing.T, pod, _, _ string) {
		got := reach(t, p.peer, 0, "", addr(pod, in), arrived)
		if got.err == nil && got.original.String() != addr(pod, in) {
			t.Errorf("%+v", got)
		}
	})
	if _, err := original.Destination(nil); err == nil {
		t.Error("no error for no connection")
	}
}

func TestNoCapture(t *testing.T) {
	if _, err := capture.New(config.Proxy{}, slog.New(slog.DiscardHandler)); err == nil || err.Error() != "capture: the configuration has none" {
		t.Errorf("%v", err)
	}
	// Nobody validated this one: root's uid would leave root's programs uncaptured.
	if _, err := capture.New(config.Proxy{Capture: &config.Capture{Inbound: 1}}, slog.New(slog.DiscardHandler)); err == nil || err.Error() != "capture.uid: required" {
		t.Errorf("%v", err)
	}
}
