package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// peer is one program under test that answers with mutual TLS.
type peer struct {
	name string
	addr string
	pid  int
	stop func()
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

func freeAddr() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	return l.Addr().String(), nil
}

// startPeers starts the programs Castellan is compared with, on the tested CPU,
// each in front of the same application and with the same certificate. One that
// is not installed is an error: a table without it would say less than it seems.
func startPeers(ctx context.Context, opt options, dir, app string, m *material) ([]peer, error) {
	var peers []peer
	fail := func(err error) ([]peer, error) {
		for _, p := range peers {
			p.stop()
		}
		return nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	for _, p := range []struct {
		name string
		conf func(addr string) string
		run  func(conf, addr string) (string, []string)
	}{
		{"envoy, 20 rules", func(a string) string { return envoyConfig(a, app, m, 20) }, func(conf, _ string) (string, []string) {
			return opt.envoy, []string{"-c", conf, "--concurrency", "1", "--disable-hot-restart", "-l", "error", "--base-id", "7"}
		}},
		{"envoy, no policy", func(a string) string { return envoyConfig(a, app, m, 0) }, func(conf, _ string) (string, []string) {
			return opt.envoy, []string{"-c", conf, "--concurrency", "1", "--disable-hot-restart", "-l", "error", "--base-id", "8"}
		}},
		{"nginx, no policy", func(a string) string { return nginxConfig(dir, a, app, m) }, func(conf, _ string) (string, []string) {
			return "/usr/sbin/nginx", []string{"-c", conf, "-p", dir}
		}},
		{"haproxy, no policy", func(a string) string { return haproxyConfig(a, app, m) }, func(conf, _ string) (string, []string) {
			return "/usr/sbin/haproxy", []string{"-db", "-f", conf}
		}},
		{"go ReverseProxy, no policy", func(string) string { return "" }, func(_, a string) (string, []string) {
			return self, []string{"reverseproxy", "-listen", a, "-app", app, "-chain", m.chain, "-key", m.key, "-roots", m.roots}
		}},
	} {
		addr, err := freeAddr()
		if err != nil {
			return fail(err)
		}
		conf := filepath.Join(dir, strings.NewReplacer(" ", "-", ",", "").Replace(p.name)+".conf")
		if err := os.WriteFile(conf, []byte(p.conf(addr)), 0o600); err != nil {
			return fail(err)
		}
		path, args := p.run(conf, addr)
		if strings.HasPrefix(p.name, "envoy") { // told by its ending what it reads
			if err := os.Rename(conf, conf+".yaml"); err != nil {
				return fail(err)
			}
			args[1] = conf + ".yaml"
		}
		pid, stop, err := start(testCPU, []string{"GOMAXPROCS=1"}, path, args...)
		if err != nil {
			return fail(fmt.Errorf("%s: %w (run `make tools`)", p.name, err))
		}
		peers = append(peers, peer{name: p.name, addr: addr, pid: pid, stop: stop})
		l := load{addr: addr, tls: clientTLS(m.cert, m.pool), path: "/r19/x", conns: 1}
		if err := waitListen(ctx, func() error {
			if out := l.run(ctx, 50*time.Millisecond); out.requests == 0 {
				return errors.Join(out.firstErr, errors.New("no answer"))
			}
			return nil
		}); err != nil {
			return fail(fmt.Errorf("%s: %w", p.name, err))
		}
	}
	return peers, nil
}

// master: nginx and haproxy run one process with these settings.
func nginxConfig(dir, addr, app string, m *material) string {
	return fmt.Sprintf(`daemon off; master_process off; worker_processes 1; pid %[1]s/nginx.pid; error_log stderr error;
events { worker_connections 8192; }
http {
  access_log off; client_body_temp_path %[1]s/b; proxy_temp_path %[1]s/p; fastcgi_temp_path %[1]s/f; uwsgi_temp_path %[1]s/u; scgi_temp_path %[1]s/s;
  keepalive_requests 100000000; keepalive_timeout 1h;
  upstream app { server %[3]s; keepalive 128; keepalive_requests 100000000; }
  server {
    listen %[2]s ssl reuseport;
    ssl_certificate %[4]s; ssl_certificate_key %[5]s; ssl_client_certificate %[6]s; ssl_verify_client on; ssl_verify_depth 3;
    ssl_protocols TLSv1.3; ssl_conf_command Ciphersuites TLS_AES_128_GCM_SHA256; ssl_ecdh_curve X25519; ssl_session_tickets off; ssl_session_cache off;
    location / { proxy_pass http://app; proxy_http_version 1.1; proxy_set_header Connection ""; }
  }
}
`, dir, addr, app, m.chain, m.key, m.roots)
}

func haproxyConfig(addr, app string, m *material) string {
	return fmt.Sprintf(`global
  nbthread 1
  maxconn 4000
  tune.ssl.cachesize 0
defaults
  mode http
  timeout connect 5s
  timeout client 1h
  timeout server 1h
  option http-keep-alive
  http-reuse always
frontend f
  bind %s ssl crt %s ca-file %s verify required ssl-min-ver TLSv1.3 curves X25519 ciphersuites TLS_AES_128_GCM_SHA256 no-tls-tickets
  default_backend b
backend b
  server s %s
`, addr, m.both, m.roots, app)
}

// rbacRules are the rules every policy of the comparison holds, as Envoy's RBAC
// filter takes them: the one that matches stands last.
func rbacRules(n int) string {
	rules := make([]string, n)
	for i := range rules {
		rules[i] = fmt.Sprintf(`r%02d: {permissions: [{and_rules: {rules: [{header: {name: ":method", string_match: {exact: GET}}}, {url_path: {path: {prefix: "/r%d/"}}}]}}], principals: [{authenticated: {principal_name: {exact: "spiffe://cluster.local/ns/shop/sa/%s"}}}]}`, i, i, ruleCaller(i, n))
	}
	return strings.Join(rules, ", ")
}

// ruleCaller names the caller of a rule: the loader's own in the last.
func ruleCaller(i, n int) string {
	if i == n-1 {
		return "frontend"
	}
	return fmt.Sprintf("caller-%d", i)
}

func envoyConfig(addr, app string, m *material, rules int) string {
	host, port, _ := net.SplitHostPort(addr)
	appHost, appPort, _ := net.SplitHostPort(app)
	rbac := ""
	if rules > 0 {
		rbac = `          - {name: envoy.filters.http.rbac, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC, rules: {action: ALLOW, policies: {` + rbacRules(rules) + "}}}}\n"
	}
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
            alpn_protocols: [http/1.1]
            tls_certificates: [{certificate_chain: {filename: %s}, private_key: {filename: %s}}]
            validation_context: {trusted_ca: {filename: %s}}
      filters:
      - name: hcm
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: in
          codec_type: HTTP1
          forward_client_cert_details: SANITIZE_SET
          set_current_client_cert_details: {uri: true}
          route_config: {virtual_hosts: [{name: all, domains: ["*"], routes: [{match: {prefix: "/"}, route: {cluster: app}}]}]}
          http_filters:
%s          - {name: router, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
  clusters:
  - name: app
    type: STATIC
    load_assignment: {cluster_name: app, endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: %s, port_value: %s}}}}]}]}
`, host, port, m.chain, m.key, m.roots, rbac, appHost, appPort)
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
		Transport: &http.Transport{MaxIdleConnsPerHost: 256, DisableCompression: true},
		ErrorLog:  log.New(os.Stderr, "", 0),
	}
	server := &http.Server{Addr: *listen, Handler: proxy, TLSConfig: &tls.Config{
		Certificates: []tls.Certificate{cert}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool,
		MinVersion: tls.VersionTLS13, CurvePreferences: []tls.CurveID{tls.X25519}, SessionTicketsDisabled: true, NextProtos: []string{"http/1.1"},
	}}
	return server.ListenAndServeTLS("", "")
}

// raiseFiles lets this process hold the connections of the memory cells.
func raiseFiles() error {
	var r syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &r); err != nil {
		return err
	}
	r.Cur = r.Max
	return syscall.Setrlimit(syscall.RLIMIT_NOFILE, &r)
}
