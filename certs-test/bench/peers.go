package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"flag"
	"fmt"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// peer is one program under test that answers with mutual TLS.
type peer struct {
	name string
	addr string
	pid  int
	// header is further lines of every request to it.
	header string
	// tcp says that it does not read HTTP.
	tcp bool
	// accessLog is emptied before each run; the disk is not under test.
	accessLog string
}

const (
	ours        = "castellan-proxy, 20 rules"
	envoyName   = "envoy, 20 rules"
	nginxName   = "nginx, no policy"
	haproxyName = "haproxy, no policy"
)

// program is a peer that can be started.
type program struct {
	name string
	tcp  bool
	h2   bool
	// conf returns the text of the configuration for a listening address.
	conf func(f *field, addr string) string
	run  func(f *field, conf, addr string) (string, []string)
}

func runEnvoy(f *field, conf, _ string) (string, []string) {
	return f.opt.envoy, []string{"-c", conf, "--concurrency", "1", "--disable-hot-restart", "-l", "error"}
}

func runHaproxy(_ *field, conf, _ string) (string, []string) {
	return "/usr/sbin/haproxy", []string{"-db", "-f", conf}
}

func runNginx(f *field, conf, _ string) (string, []string) {
	return "/usr/sbin/nginx", []string{"-c", conf, "-p", f.dir}
}

func runGo(f *field, _, addr string) (string, []string) {
	self, err := os.Executable()
	if err != nil {
		self = os.Args[0]
	}
	return self, []string{"reverseproxy", "-listen", addr, "-app", f.backend, "-chain", f.mat.chain, "-key", f.mat.key, "-roots", f.mat.roots}
}

// The programs Castellan is compared with.
func envoyRules() program {
	return program{name: envoyName, conf: envoyConfig(envoyHTTP("HTTP1", benchRules), "http/1.1"), run: runEnvoy}
}

func nginx() program { return program{name: nginxName, conf: nginxConfig, run: runNginx} }

func httpPeers() []program {
	return []program{
		envoyRules(),
		{name: "envoy, no policy", conf: envoyConfig(envoyHTTP("HTTP1", 0), "http/1.1"), run: runEnvoy},
		nginx(),
		{name: haproxyName, conf: haproxyConfig("http"), run: runHaproxy},
		{name: "go ReverseProxy, no policy", conf: func(*field, string) string { return "" }, run: runGo},
	}
}

func http2Peer() program {
	return program{name: "envoy, HTTP/2, 20 rules", h2: true, conf: envoyConfig(envoyHTTP("HTTP2", benchRules), "h2"), run: runEnvoy}
}

func tcpPeers() []program {
	return []program{
		{name: "envoy, TCP", tcp: true, conf: envoyConfig(envoyTCP, ""), run: runEnvoy},
		{name: "haproxy, TCP", tcp: true, conf: haproxyConfig("tcp"), run: runHaproxy},
	}
}

// material is one workload's certificate, as files and loaded.
type material struct {
	chain, key, both, roots string
	cert                    tls.Certificate
	pool                    *x509.CertPool
}

// fetchMaterial takes an SVID from a workload's socket and writes it for programs
// that read files.
func fetchMaterial(ctx context.Context, socket, dir string) (*material, error) {
	got, err := workloadapi.FetchX509Context(ctx, workloadapi.WithAddr("unix://"+socket))
	if err != nil {
		return nil, err
	}
	svid := got.DefaultSVID()
	key, err := x509.MarshalPKCS8PrivateKey(svid.PrivateKey)
	if err != nil {
		return nil, err
	}
	var chain, roots []byte
	m := &material{pool: x509.NewCertPool(), cert: tls.Certificate{PrivateKey: svid.PrivateKey, Leaf: svid.Certificates[0]}}
	for _, c := range svid.Certificates {
		m.cert.Certificate = append(m.cert.Certificate, c.Raw)
		chain = append(chain, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	bundle, err := got.Bundles.GetX509BundleForTrustDomain(svid.ID.TrustDomain())
	if err != nil {
		return nil, err
	}
	for _, c := range bundle.X509Authorities() {
		m.pool.AddCert(c)
		roots = append(roots, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	keyPEM := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})
	for _, f := range []struct {
		dst  *string
		name string
		data []byte
	}{{&m.chain, "chain.pem", chain}, {&m.key, "key.pem", keyPEM}, {&m.both, "both.pem", append(append([]byte{}, chain...), keyPEM...)}, {&m.roots, "roots.pem", roots}} {
		*f.dst = filepath.Join(dir, f.name)
		if err := os.WriteFile(*f.dst, f.data, 0o600); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// peerVersions names the programs as they name themselves.
func peerVersions(opt options) string {
	var out []string
	for _, p := range [][]string{{"/usr/sbin/nginx", "-v"}, {"/usr/sbin/haproxy", "-v"}} {
		text, _ := exec.Command(p[0], p[1]).CombinedOutput()
		line, _, _ := strings.Cut(string(text), "\n")
		out = append(out, strings.TrimSpace(line))
	}
	return strings.Join(append(out, filepath.Base(opt.envoy)), "; ")
}

// start starts programs on the tested CPU, each in front of the same backend and
// with the same certificate. One that is not installed is an error: a table
// without it would say less than it seems.
func (f *field) start(ctx context.Context, programs ...program) ([]peer, error) {
	var peers []peer
	for _, g := range programs {
		addr, err := freeAddr()
		if err != nil {
			return nil, err
		}
		conf := filepath.Join(f.dir, strings.NewReplacer(" ", "-", ",", "", "/", "").Replace(g.name)+".yaml") // Envoy is told by the ending what it reads
		if err := os.WriteFile(conf, []byte(g.conf(f, addr)), 0o600); err != nil {
			return nil, err
		}
		path, args := g.run(f, conf, addr)
		pid, stop, err := start(testCPU, path, args...)
		if err != nil {
			return nil, fmt.Errorf("%s: %w (run `make tools`)", g.name, err)
		}
		f.stops = append(f.stops, stop)
		p := peer{name: g.name, addr: addr, pid: pid, tcp: g.tcp}
		l := f.load(p, 1024, 1)
		if g.h2 {
			l = f.load2(p)
		}
		if err := f.ready(ctx, p.name, l); err != nil {
			return nil, err
		}
		peers = append(peers, p)
	}
	return peers, nil
}

// nginxConfig runs one process.
func nginxConfig(f *field, addr string) string {
	return fmt.Sprintf(`daemon off; master_process off; worker_processes 1; pid %[1]s/nginx.pid; error_log stderr error;
events { worker_connections 8192; }
http {
  access_log off; client_body_temp_path %[1]s/b; proxy_temp_path %[1]s/p; fastcgi_temp_path %[1]s/f; uwsgi_temp_path %[1]s/u; scgi_temp_path %[1]s/s;
  keepalive_requests 100000000; keepalive_timeout 1h;
  upstream app { server %[3]s; keepalive 512; keepalive_requests 100000000; }
  server {
    listen %[2]s ssl reuseport;
    ssl_certificate %[4]s; ssl_certificate_key %[5]s; ssl_client_certificate %[6]s; ssl_verify_client on; ssl_verify_depth 3;
    ssl_protocols TLSv1.3; ssl_conf_command Ciphersuites TLS_AES_128_GCM_SHA256; ssl_ecdh_curve X25519; ssl_session_tickets off; ssl_session_cache off;
    location / { proxy_pass http://app; proxy_http_version 1.1; proxy_set_header Connection ""; }
  }
}
`, f.dir, addr, f.backend, f.mat.chain, f.mat.key, f.mat.roots)
}

func haproxyConfig(mode string) func(*field, string) string {
	http := ""
	if mode == "http" {
		http = "  option http-keep-alive\n  http-reuse always\n"
	}
	return func(f *field, addr string) string {
		return fmt.Sprintf(`global
  nbthread 1
  maxconn 4000
  tune.ssl.cachesize 0
defaults
  mode %s
  timeout connect 5s
  timeout client 1h
  timeout server 1h
%sfrontend f
  bind %s ssl crt %s ca-file %s verify required ssl-min-ver TLSv1.3 curves X25519 ciphersuites TLS_AES_128_GCM_SHA256 no-tls-tickets
  default_backend b
backend b
  server s %s
`, mode, http, addr, f.mat.both, f.mat.roots, f.backend)
	}
}

// rbacRules are the rules every policy of the comparison holds, as Envoy's RBAC
// filter takes them: the one that matches stands last.
func rbacRules(n int) string {
	rules := make([]string, n)
	for i := range rules {
		rules[i] = fmt.Sprintf(`r%02d: {permissions: [{and_rules: {rules: [{header: {name: ":method", string_match: {exact: GET}}}, {url_path: {path: {prefix: "/r%d/"}}}]}}], principals: [{authenticated: {principal_name: {exact: "spiffe://cluster.local/ns/shop/sa/%s"}}}]}`, i, i, ruleCaller(i))
	}
	return strings.Join(rules, ", ")
}

// envoyTCP is the filter that passes bytes on.
const envoyTCP = `      - {name: tcp, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy, stat_prefix: in, cluster: app}}
`

// envoyHTTP is the filter that reads HTTP, with so many rules.
func envoyHTTP(codec string, rules int) string {
	rbac := ""
	if rules > 0 {
		rbac = `          - {name: envoy.filters.http.rbac, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC, rules: {action: ALLOW, policies: {` + rbacRules(rules) + "}}}}\n"
	}
	return fmt.Sprintf(`      - name: hcm
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: in
          codec_type: %s
          forward_client_cert_details: SANITIZE_SET
          set_current_client_cert_details: {uri: true}
          route_config: {virtual_hosts: [{name: all, domains: ["*"], routes: [{match: {prefix: "/"}, route: {cluster: app}}]}]}
          http_filters:
%s          - {name: router, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
`, codec, rbac)
}

// envoyConfig is a listener with mutual TLS, a filter and the backend.
func envoyConfig(filter, alpn string) func(*field, string) string {
	return func(f *field, addr string) string {
		host, port, _ := net.SplitHostPort(addr)
		appHost, appPort, _ := net.SplitHostPort(f.backend)
		return fmt.Sprintf(`static_resources:
  listeners:
  - name: in
    address: {socket_address: {address: %s, port_value: %s}}
    filter_chains:
    - transport_socket:
        name: tls
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
          require_client_certificate: true
          disable_stateless_session_resumption: true
          disable_stateful_session_resumption: true
          common_tls_context:
            tls_params: {tls_minimum_protocol_version: TLSv1_3, ecdh_curves: [X25519]}
            alpn_protocols: [%s]
            tls_certificates: [{certificate_chain: {filename: %s}, private_key: {filename: %s}}]
            validation_context: {trusted_ca: {filename: %s}}
      filters:
%s  clusters:
  - name: app
    type: STATIC
    circuit_breakers: {thresholds: [{max_connections: 20000, max_pending_requests: 20000, max_requests: 20000}]}
    load_assignment: {cluster_name: app, endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: %s, port_value: %s}}}}]}]}
`, host, port, alpn, f.mat.chain, f.mat.key, f.mat.roots, filter, appHost, appPort)
	}
}

// runReverseProxy is what net/http and httputil.ReverseProxy cost, without policy.
func runReverseProxy(args []string) error {
	fs := flag.NewFlagSet("reverseproxy", flag.ContinueOnError)
	listen := fs.String("listen", "", "address")
	app := fs.String("app", "", "address")
	chain := fs.String("chain", "", "file")
	key := fs.String("key", "", "file")
	roots := fs.String("roots", "", "file")
	if err := fs.Parse(args); err != nil {
		return err
	}
	cert, err := tls.LoadX509KeyPair(*chain, *key)
	if err != nil {
		return err
	}
	data, err := os.ReadFile(*roots)
	if err != nil {
		return err
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(data)
	target := &url.URL{Scheme: "http", Host: *app}
	proxy := &httputil.ReverseProxy{
		Rewrite:   func(r *httputil.ProxyRequest) { r.SetURL(target) },
		Transport: &http.Transport{MaxIdleConnsPerHost: 512, DisableCompression: true},
		ErrorLog:  log.New(os.Stderr, "", 0),
	}
	server := &http.Server{Addr: *listen, Handler: proxy, TLSConfig: &tls.Config{
		Certificates: []tls.Certificate{cert}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool,
		MinVersion: tls.VersionTLS13, CurvePreferences: []tls.CurveID{tls.X25519}, SessionTicketsDisabled: true, NextProtos: []string{"http/1.1"},
	}}
	return server.ListenAndServeTLS("", "")
}
