package config_test

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"castellan.dev/internal/config"
)

const goodPod = header + `ProxyConfig
agentSocket: /var/run/secrets/workload-spiffe-uds/socket
capture: {inbound: 15006, outbound: 15001, includeInboundPorts: "*", excludeInboundPorts: [15020, "15021"], includeOutboundIPRanges: ["*"]}
ready: ":15021"
probes:
  /app-health/app/readyz: {httpGet: {path: "/healthz?x", port: 8080, httpHeaders: [{name: x, value: z}]}}
  /app-health/app/livez: {tcpSocket: {port: 8080}, timeoutSeconds: 3}
  /app-health/app/startupz: {grpc: {port: 9090, service: a}}
`

func TestProxyInAPod(t *testing.T) {
	ports := make([]string, 1025)
	for i := range ports {
		ports[i] = "1"
	}
	many, _ := json.Marshal(ports)
	rows := map[string]row{
		"good":              {`{}`, ""},
		"no capture at all": {`{capture: null}`, `inbound, outbound, capture: at least one listener is needed`},
		"nothing captured":  {`{capture: {inbound: 0, outbound: 0}}`, `capture.inbound, outbound: at least one port is needed`},
		"inbound only":      {`{capture: {outbound: 0}}`, ""},
		"outbound only":     {`{capture: {inbound: null}}`, ""},
		"one for both":      {`{capture: {inbound: 15001}}`, `capture.outbound: 15001 is the inbound port`},
		"ready":             {`{ready: "15021"}`, `ready: address 15021: missing port in address`},
		"unknown field":     {`{capture: {udp: true}}`, `unknown field "capture.udp"`},

		"port range":       {`{capture: {excludeInboundPorts: ["9000-9010", 22]}}`, ""},
		"single port":      {`{capture: {excludeOutboundPorts: 22}}`, ""},
		"port 0":           {`{capture: {includeInboundPorts: [80, 0]}}`, `capture.includeInboundPorts[1]: "0" is no port: give a number, a range such as "9000-9010", or "*"`},
		"port too high":    {`{capture: {includeOutboundPorts: ["65536"]}}`, `capture.includeOutboundPorts[0]: "65536" is no port: give a number, a range such as "9000-9010", or "*"`},
		"range backwards":  {`{capture: {excludeOutboundPorts: ["9-8"]}}`, `capture.excludeOutboundPorts[0]: "9-8" is no port: give a number, a range such as "9000-9010", or "*"`},
		"list in a string": {`{capture: {excludeInboundPorts: "80,81"}}`, `capture.excludeInboundPorts[0]: "80,81" is no port: give a number, a range such as "9000-9010", or "*"`},
		"port of no kind":  {`{capture: {excludeInboundPorts: [{}]}}`, `{} is no port: give a number, a range such as "9000-9010", or "*"`},
		"too many ports":   {`{capture: {excludeInboundPorts: ` + string(many) + `}}`, `capture.excludeInboundPorts: 1025 items, at most 1024 are taken`},
		"address":          {`{capture: {excludeOutboundIPRanges: ["169.254.169.254", "fd00::/8"]}}`, ""},
		"no address":       {`{capture: {excludeOutboundIPRanges: [10.0.0.0/8, db.example]}}`, `capture.excludeOutboundIPRanges[1]: "db.example" is no address range: give one such as "10.0.0.0/8", or "*"`},
		"mapped address":   {`{capture: {includeOutboundIPRanges: ["::ffff:10.0.0.1"]}}`, `capture.includeOutboundIPRanges[0]: "::ffff:10.0.0.1" is no address range: give one such as "10.0.0.0/8", or "*"`},
		"everything but":   {`{capture: {excludeOutboundIPRanges: ["*"]}}`, `capture.excludeOutboundIPRanges: "*" would leave nothing; set outbound to 0`},
		"too many addresses": {`{capture: {includeOutboundIPRanges: ` + strings.ReplaceAll(string(many), `"1"`, `"10.0.0.1"`) + `}}`,
			`capture.includeOutboundIPRanges: 1025 items, at most 1024 are taken`},

		"probe elsewhere":     {`{probes: {/metrics: {tcpSocket: {port: 1}}}}`, `probes["/metrics"]: want a path below /app-health/`},
		"probe, pattern":      {`{probes: {"/app-health/{x}": {tcpSocket: {port: 1}}}}`, `probes["/app-health/{x}"]: want a path below /app-health/`},
		"probe of nothing":    {`{probes: {/app-health/a: {}}}`, `probes["/app-health/a"].httpGet: set exactly one of httpGet, tcpSocket and grpc`},
		"probe of two":        {`{probes: {/app-health/a: {tcpSocket: {port: 1}, grpc: {port: 2}}}}`, `probes["/app-health/a"].httpGet: set exactly one of httpGet, tcpSocket and grpc`},
		"probe without port":  {`{probes: {/app-health/a: {grpc: {}}}}`, `probes["/app-health/a"].grpc.port: required`},
		"probe, scheme":       {`{probes: {/app-health/a: {httpGet: {port: 1, scheme: https}}}}`, `probes["/app-health/a"].httpGet.scheme: "https", want HTTP or HTTPS`},
		"probe, header":       {`{probes: {/app-health/a: {httpGet: {port: 1, httpHeaders: [{value: x}]}}}}`, `probes["/app-health/a"].httpGet.httpHeaders[0].name: required`},
		"probe, no time":      {`{probes: {/app-health/a: {httpGet: {port: 1}, timeoutSeconds: -1}}}`, `probes["/app-health/a"].timeoutSeconds: -1, want 1 to 3600`},
		"probe, unknown kind": {`{probes: {/app-health/a: {exec: {command: [x]}}}}`, `unknown field "probes./app-health/a.exec"`},
	}
	runRows(t, goodPod, rows, func() interface{ Validate() error } { return &config.Proxy{} })

	t.Setenv("POD_CONFIG", goodPod)
	var p config.Proxy
	if err := config.LoadEnv("POD_CONFIG", &p); err != nil {
		t.Fatal(err)
	}
	ready, live := p.Probes["/app-health/app/readyz"], p.Probes["/app-health/app/livez"]
	if p.Capture.UID != 1337 || ready.HTTPGet.Scheme != "HTTP" || ready.TimeoutSeconds != 1 || live.TimeoutSeconds != 3 {
		t.Errorf("%+v %+v %+v", p.Capture, ready, live)
	}
	t.Setenv("POD_CONFIG", goodPod+"more: 1\n")
	if err := config.LoadEnv("POD_CONFIG", &p); err == nil || err.Error() != `config: $POD_CONFIG: unknown field "more"` {
		t.Errorf("%v", err)
	}
	if err := config.LoadEnv("POD_CONFIG_NOT_SET", &p); err == nil || err.Error() != `config: environment variable POD_CONFIG_NOT_SET is not set` {
		t.Errorf("%v", err)
	}
}

func TestRanges(t *testing.T) {
	type ranges = []config.PortRange
	for text, want := range map[string]struct {
		ranges ranges
		all    bool
	}{
		`[]`:                             {},
		`"*"`:                            {nil, true},
		`["*", 80]`:                      {ranges{{80, 80}}, true},
		`[443, 80, "80"]`:                {ranges{{80, 80}, {443, 443}}, false},
		`["8000-8010", "8005-8020", 80]`: {ranges{{80, 80}, {8000, 8020}}, false},
		`[80, 81, "82-90"]`:              {ranges{{80, 90}}, false},
		`["1-65535", 9]`:                 {ranges{{1, 65535}}, false},
		`[65535, "65534"]`:               {ranges{{65534, 65535}}, false},
	} {
		var list config.PortList
		if err := json.Unmarshal([]byte(text), &list); err != nil {
			t.Fatal(err)
		}
		got, all, err := list.Ranges()
		if err != nil || all != want.all || !slices.Equal(got, want.ranges) {
			t.Errorf("%s: %v %v %v", text, got, all, err)
		}
	}
	got, all, err := config.ParseIPRanges([]string{"10.1.2.3/8", "fd00::1", "*"})
	want := []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("fd00::1/128")}
	if err != nil || !all || fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("%v %v %v", got, all, err)
	}
}

// Connections are bounded by what the memory holds, and never above what was asked for.
func TestFit(t *testing.T) {
	for name, tt := range map[string]struct {
		connections, perSource int
		memory                 int64
		wantAll, wantOne       int
	}{
		"no limit":        {8000, 2500, 0, 8000, 2500},
		"of a sidecar":    {8000, 2500, 256 << 20, 2730, 910},
		"plenty":          {8000, 2500, 4 << 30, 8000, 2500},
		"fewer asked for": {100, 100, 256 << 20, 100, 100},
		"next to nothing": {8000, 2500, 96 << 10, 1, 1},
	} {
		l := config.ProxyLimits{MaxConnections: tt.connections, MaxPerSource: tt.perSource}
		if l.Fit(tt.memory); l.MaxConnections != tt.wantAll || l.MaxPerSource != tt.wantOne {
			t.Errorf("%s: %d and %d", name, l.MaxConnections, l.MaxPerSource)
		}
	}
}
