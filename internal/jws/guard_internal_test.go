package jws

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
)

func TestGuardAddresses(t *testing.T) {
	everything := []string{"0.0.0.0/0", "::/0", "http"}
	tests := map[string]struct {
		allow []string
		addr  string
		ok    bool
	}{
		"public":                             {nil, "93.184.216.34", true},
		"public, IPv6":                       {nil, "2606:2800:220:1::1", true},
		"loopback":                           {nil, "127.0.0.1", false},
		"loopback, another":                  {nil, "127.8.8.8", false},
		"loopback, IPv6":                     {nil, "::1", false},
		"loopback, mapped":                   {nil, "::ffff:127.0.0.1", false},
		"loopback, compatible":               {nil, "::127.0.0.1", false},
		"loopback, NAT64":                    {nil, "64:ff9b::7f00:1", false},
		"loopback, 6to4":                     {nil, "2002:7f00:1::", false},
		"private 10/8":                       {nil, "10.1.2.3", false},
		"private 172.16/12":                  {nil, "172.31.0.1", false},
		"private 192.168/16":                 {nil, "192.168.1.1", false},
		"private, IPv6":                      {nil, "fd12::1", false},
		"private, mapped":                    {nil, "::ffff:10.0.0.1", false},
		"carriers' NAT":                      {nil, "100.64.0.1", false},
		"loopback allowed":                   {[]string{"127.0.0.0/8"}, "127.0.0.1", true},
		"loopback allowed, mapped":           {[]string{"127.0.0.0/8"}, "::ffff:127.0.0.1", true},
		"one address allowed":                {[]string{"10.0.0.7"}, "10.0.0.7", true},
		"one address allowed, another asked": {[]string{"10.0.0.7"}, "10.0.0.8", false},
		"http allows no address":             {[]string{"http"}, "127.0.0.1", false},
		"private allowed":                    {[]string{"10.0.0.0/8"}, "10.1.2.3", true},
		"other private allowed":              {[]string{"10.0.0.0/8"}, "192.168.1.1", false},
		"metadata":                           {everything, "169.254.169.254", false},
		"metadata, mapped":                   {everything, "::ffff:169.254.169.254", false},
		"metadata, compatible":               {everything, "::169.254.169.254", false},
		"metadata, NAT64":                    {everything, "64:ff9b::a9fe:a9fe", false},
		"metadata, 6to4":                     {everything, "2002:a9fe:a9fe::", false},
		"metadata of AWS, IPv6":              {everything, "fd00:ec2::254", false},
		"metadata of Alibaba":                {everything, "100.100.100.200", false},
		"metadata of Azure":                  {everything, "168.63.129.16", false},
		"metadata of Oracle":                 {everything, "192.0.0.192", false},
		"link-local":                         {everything, "169.254.1.1", false},
		"link-local, IPv6":                   {everything, "fe80::1", false},
		"link-local with a zone":             {everything, "fe80::1%eth0", false},
		"multicast":                          {everything, "224.0.0.1", false},
		"unspecified":                        {everything, "0.0.0.0", false},
		"unspecified, IPv6":                  {everything, "::", false},
		"broadcast":                          {everything, "255.255.255.255", false},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			g, err := newGuard(tt.allow)
			if err != nil {
				t.Fatal(err)
			}
			err = g.control("tcp", netip.AddrPortFrom(netip.MustParseAddr(tt.addr), 443).String(), nil)
			if (err == nil) != tt.ok || err != nil && !errors.Is(err, ErrBlocked) {
				t.Fatalf("%v, want allowed %v", err, tt.ok)
			}
		})
	}
	if _, err := newGuard([]string{"10.0.0.0/99"}); err == nil || !strings.Contains(err.Error(), `allow[0]: "10.0.0.0/99" is neither`) {
		t.Errorf("bad entry: %v", err)
	}
}

func TestGuardURLs(t *testing.T) {
	tests := map[string]struct {
		allow []string
		url   string
		text  string
	}{
		"https":                {nil, "https://issuer.test/keys", ""},
		"http":                 {nil, "http://issuer.test/keys", `is plain http; use https, or add "http" to jwks.allow`},
		"http allowed":         {[]string{"http"}, "http://issuer.test/keys", ""},
		"file":                 {[]string{"http"}, "file:///etc/passwd", "https is wanted"},
		"gopher":               {[]string{"http"}, "gopher://x", "https is wanted"},
		"no scheme":            {nil, "issuer.test/keys", "https is wanted"},
		"no host":              {nil, "https:///keys", "has no host"},
		"user information":     {nil, "https://u:hunter2@issuer.test/keys", "has user information in it"},
		"broken":               {nil, "https://[::1/keys", "is not a URL"},
		"backslash, two hosts": {nil, `https://good.test\@evil.test/`, "is not a URL"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			g, err := newGuard(tt.allow)
			if err != nil {
				t.Fatal(err)
			}
			err = g.checkURL(tt.url)
			if tt.text == "" && err != nil || tt.text != "" && (err == nil || !strings.Contains(err.Error(), tt.text)) {
				t.Fatalf("%v, want %q", err, tt.text)
			}
			if err != nil && strings.Contains(err.Error(), "hunter2") {
				t.Error("the error tells the password")
			}
		})
	}
}
