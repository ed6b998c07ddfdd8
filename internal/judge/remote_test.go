package judge_test

import (
	"net/netip"
	"strings"
	"testing"

	"castellan.dev/internal/judge"
)

func TestRemoteIP(t *testing.T) {
	tests := map[string]struct {
		forwarded []string
		trusted   int
		want      string // "" is unknown: the packet's source
	}{
		"nobody is trusted":            {[]string{"203.0.113.9"}, 0, ""},
		"negative":                     {[]string{"203.0.113.9"}, -1, ""},
		"one":                          {[]string{"203.0.113.9"}, 1, "203.0.113.9"},
		"the last of several":          {[]string{"6.6.6.6, 203.0.113.9"}, 1, "203.0.113.9"},
		"two":                          {[]string{"6.6.6.6, 203.0.113.9, 10.0.0.1"}, 2, "203.0.113.9"},
		"over several fields":          {[]string{"6.6.6.6", "203.0.113.9", "10.0.0.1"}, 2, "203.0.113.9"},
		"fewer than are trusted":       {[]string{"203.0.113.9"}, 2, ""},
		"none at all":                  {nil, 1, ""},
		"empty":                        {[]string{""}, 1, ""},
		"empty element":                {[]string{"203.0.113.9,"}, 1, ""},
		"port":                         {[]string{"203.0.113.9:5000"}, 1, "203.0.113.9"},
		"IPv6":                         {[]string{"2001:db8::1"}, 1, "2001:db8::1"},
		"IPv6 in brackets":             {[]string{"[2001:db8::1]"}, 1, "2001:db8::1"},
		"IPv6 and port":                {[]string{"[2001:db8::1]:5000"}, 1, "2001:db8::1"},
		"mapped":                       {[]string{"::ffff:203.0.113.9"}, 1, "203.0.113.9"},
		"zone":                         {[]string{"fe80::1%eth0"}, 1, "fe80::1"},
		"spaces and tabs":              {[]string{"6.6.6.6,\t 203.0.113.9 \t"}, 1, "203.0.113.9"},
		"a name":                       {[]string{"client.example"}, 1, ""},
		"unknown":                      {[]string{"unknown"}, 1, ""},
		"more than are looked at":      {[]string{strings.Repeat("1.1.1.1,", 64) + "1.1.1.1"}, 65, ""},
		"as many as are looked at":     {[]string{"203.0.113.9," + strings.Repeat("1.1.1.1,", 62) + "1.1.1.1"}, 64, "203.0.113.9"},
		"malformed one is no excuse":   {[]string{"203.0.113.9, x"}, 1, ""},
		"leading zeros are no address": {[]string{"010.0.0.1"}, 1, ""},
		"malformed ones not looked at": {[]string{"x, 203.0.113.9"}, 1, "203.0.113.9"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			var want netip.Addr
			if tt.want != "" {
				want = netip.MustParseAddr(tt.want)
			}
			h := headers{"x-forwarded-for": tt.forwarded}
			if got := judge.RemoteIP(h, tt.trusted); got != want {
				t.Errorf("%v, want %v", got, want)
			}
			if n := testing.AllocsPerRun(50, func() { judge.RemoteIP(h, tt.trusted) }); n > 0 && want.IsValid() && !strings.Contains(tt.forwarded[0], "%") {
				t.Errorf("%v allocations", n)
			}
		})
	}
}

func TestProtocolOf(t *testing.T) {
	for declared, want := range map[string]judge.Protocol{
		"": judge.Undeclared, "http": judge.HTTP, "http1": judge.HTTP, "http/1.1": judge.HTTP,
		"http2": judge.HTTP2, "h2c": judge.HTTP2, "grpc": judge.HTTP2, "grpc-web": judge.HTTP2,
		// Opaque: of TLS and of what is unknown nothing can be read.
		"tcp": judge.TCP, "tls": judge.TCP, "https": judge.TCP, "mongo": judge.TCP, "HTTP": judge.TCP,
	} {
		if got := judge.ProtocolOf(declared); got != want {
			t.Errorf("%q: %v, want %v", declared, got, want)
		}
	}
}
