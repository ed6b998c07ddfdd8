package kubernetes_test

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"sync"
	"testing"

	"castellan.dev/certs-test/kubernetes/apps/control"
)

const envoyImage = "docker.io/local/envoy:1.40.0"

// envoyLoaded packs the real Envoy with the C library of this machine, which it was
// linked against, and loads it.
var envoyLoaded = sync.OnceValue(func() error {
	dir := os.Getenv("CASTELLAN_TOOLS")
	if dir == "" {
		cache, err := os.UserCacheDir()
		if err != nil {
			return err
		}
		dir = filepath.Join(cache, "castellan", "tools")
	}
	binary := filepath.Join(dir, "envoy-1.40.0")
	out, err := exec.Command("ldd", binary).Output()
	if err != nil {
		return fmt.Errorf("ldd %s: %w (make tools installs it)", binary, err)
	}
	args := []string{"-name", envoyImage, "-binary", binary}
	for _, lib := range regexp.MustCompile(`/\S+`).FindAllString(string(out), -1) {
		args = append(args, "-file", lib+"="+lib)
	}
	ctx := context.Background()
	if err := pack(ctx, path("envoy.tar"), args...); err != nil {
		return err
	}
	return shared.LoadImage(ctx, path("envoy.tar"))
})

func needEnvoy(t *testing.T) {
	t.Helper()
	needCluster(t)
	if err := envoyLoaded(); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
}

// envoyConfig is an Envoy that serves with the pod's certificate on 10000 and tells
// callers who they are, and on 10001 calls a peer with it. The names are Istio's.
func envoyConfig(peer *app) string {
	sds := func(name string) string {
		return `{name: "` + name + `", sds_config: {resource_api_version: V3, api_config_source: {api_type: GRPC, transport_api_version: V3, grpc_services: [{envoy_grpc: {cluster_name: sds}}]}}}`
	}
	context := func(kind, more, match string) string {
		return `{name: tls, typed_config: {"@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.` + kind + more + `, common_tls_context: {
        tls_params: {tls_minimum_protocol_version: TLSv1_3, tls_maximum_protocol_version: TLSv1_3},
        tls_certificate_sds_secret_configs: [` + sds("default") + `],
        combined_validation_context: {default_validation_context: {` + match + `}, validation_context_sds_secret_config: ` + sds("ROOTCA") + `}}}}`
	}
	match := `match_typed_subject_alt_names: [{san_type: URI, matcher: {exact: "` + peer.id() + `"}}]`
	hcm := func(route string) string {
		return `[{name: hcm, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager, stat_prefix: x,
        route_config: {virtual_hosts: [{name: all, domains: ["*"], routes: [` + route + `]}]},
        http_filters: [{name: router, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}]}}]`
	}
	return `node: {id: test, cluster: test}
static_resources:
  listeners:
  - name: server
    address: {socket_address: {address: 0.0.0.0, port_value: 10000}}
    filter_chains: [{transport_socket: ` + context("DownstreamTlsContext", ", require_client_certificate: true", "") + `, filters: ` +
		hcm(`{match: {prefix: "/"}, direct_response: {status: 200}, response_headers_to_add: [{header: {key: x-peer, value: "%DOWNSTREAM_PEER_URI_SAN%"}}]}`) + `}]
  - name: client
    address: {socket_address: {address: 0.0.0.0, port_value: 10001}}
    filter_chains: [{filters: ` + hcm(`{match: {prefix: "/"}, route: {cluster: peer}}`) + `}]
  clusters:
  - {name: sds, connect_timeout: 1s, typed_extension_protocol_options: {envoy.extensions.upstreams.http.v3.HttpProtocolOptions: {"@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, explicit_http_config: {http2_protocol_options: {}}}},
     load_assignment: {cluster_name: sds, endpoints: [{lb_endpoints: [{endpoint: {address: {pipe: {path: /var/run/secrets/workload-spiffe-uds/socket}}}}]}]}}
  - {name: peer, connect_timeout: 1s, transport_socket: ` + context("UpstreamTlsContext", "", match) + `,
     load_assignment: {cluster_name: peer, endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: ` + peer.IP + `, port_value: ` + fmt.Sprint(control.SPIFFE) + `}}}}]}]}}
`
}

// Promise: a real Envoy in a pod uses the CSI socket directly, as Istio's configuration
// has it: it serves and calls with the pod's certificate.
func TestEnvoyInAPod(t *testing.T) {
	t.Parallel()
	needEnvoy(t)
	const ns = "envoy"
	namespace(t, ns)
	peer := one(t, ns, pod{Name: "peer", Node: "node-1", Volume: true, Socket: true})
	err := api.post("/api/v1/namespaces/"+ns+"/configmaps", object{
		"metadata": object{"name": "envoy"}, "data": object{"envoy.yaml": envoyConfig(peer)}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	envoy := one(t, ns, pod{Name: "envoy", Node: "node-2", Volume: true, Change: func(spec object) {
		spec["volumes"] = append(spec["volumes"].([]object), object{"name": "config", "configMap": object{"name": "envoy"}})
		c := spec["containers"].([]object)[0]
		delete(c, "readinessProbe")
		c["image"] = envoyImage
		c["args"] = []string{"-c", "/etc/envoy/envoy.yaml", "--concurrency", "1", "--disable-hot-restart", "-l", "warning"}
		c["volumeMounts"] = append(c["volumeMounts"].([]object), object{"name": "config", "mountPath": "/etc/envoy"})
	}})
	t.Run("as a server", func(t *testing.T) {
		c := control.Call{Kind: "spiffe", URL: "https://" + net.JoinHostPort(envoy.IP, "10000") + "/", Expect: envoy.id()}
		if r := succeeds(t, peer, c); r.Header["X-Peer"] != peer.id() {
			t.Errorf("Envoy saw %+v, want %s", r, peer.id())
		}
	})
	t.Run("as a client", func(t *testing.T) {
		r := peer.reaches(t, "http://"+net.JoinHostPort(envoy.IP, "10001")+"/")
		if r.Seen == nil || r.Seen.Peer != envoy.id() {
			t.Errorf("the program saw %+v, want %s", r.Seen, envoy.id())
		}
	})
	t.Run("nobody without a certificate", func(t *testing.T) {
		peer.fails(t, control.Call{Kind: "nobody", URL: net.JoinHostPort(envoy.IP, "10000")}, "certificate required")
	})
}
