package up

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"sigs.k8s.io/yaml"

	"castellan.dev/api/policy"
	"castellan.dev/deploy/samples"
	"castellan.dev/internal/config"
	"castellan.dev/internal/workloads"
)

const (
	nodeName     = "local"
	clusterName  = "Kubernetes" // as istio-agent assumes
	agentAccount = "castellan-system/castellan-agent"
	systemNS     = "castellan-system"
	// appPort is the workload port that policies speak of; the listeners have others, as all share one address.
	appPort     = 8080
	servicePort = 80
)

// exampleKeys is the line of the samples that holds the end-user issuer's keys.
var exampleKeys = regexp.MustCompile(`jwks: '[^']*'`)

// sampleWorkloads are the workloads of the sample mesh; those that serve are its services.
var sampleWorkloads = []sampleWorkload{
	{"shop", "frontend", true},
	{"shop", "orders", true},
	{"shop", "payments", true},
	{"guest", "intruder", false},
}

type sampleWorkload struct {
	namespace, account string
	service            bool
}

func (w sampleWorkload) key() string  { return w.namespace + "/" + w.account }
func (w sampleWorkload) file() string { return w.namespace + "." + w.account }

// mesh is everything one run knows.
type mesh struct {
	trustDomain spiffeid.TrustDomain
	ttl         time.Duration
	layout      layout
	policyDir   string
	binDir      string
	self        string
	log         *slog.Logger
	now         func() time.Time
	progress    io.Writer
	ready       func(File)

	state     *state
	issuers   *issuers
	workloads *issuer
	users     *issuer
}

// checkSockets refuses a directory under which the kernel would refuse a socket.
func (m *mesh) checkSockets() error {
	paths := []string{m.layout.path("server", "admin.sock")}
	for _, w := range sampleWorkloads {
		paths = append(paths, m.socket(w))
	}
	for _, path := range paths {
		if err := config.CheckSocketPath(path); err != nil {
			return inputErrorf("--data-dir: the socket %w", err)
		}
	}
	return nil
}

// prepare writes everything the parts read. Nothing runs yet.
func (m *mesh) prepare() error {
	var err error
	if m.state, err = loadState(m.layout.path("state.json"), m.trustDomain.Name(), m.portNames(), m.uidNames()); err != nil {
		return err
	}
	if err := m.state.checkPorts(3 * time.Second); err != nil {
		return err
	}
	// What the last run said is no longer so.
	if err := os.Remove(m.layout.path("up.json")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("up: %w", err)
	}
	for _, step := range []func() error{m.openIssuers, m.copySamples, m.writeConfigs} {
		if err := step(); err != nil {
			return err
		}
	}
	return m.issuers.refresh()
}

func (m *mesh) portNames() []string {
	names := []string{"server/grpc", "server/http", "agent/admin"}
	for _, w := range sampleWorkloads {
		for _, l := range []string{"inbound", "app", "admin"} {
			names = append(names, w.key()+"/"+l)
		}
		for _, to := range sampleWorkloads {
			if to.service {
				names = append(names, w.key()+"/outbound/"+to.account)
			}
		}
	}
	return names
}

func (m *mesh) uidNames() []string {
	names := []string{"pod/" + agentAccount, "account/" + agentAccount, "node/" + nodeName}
	for _, w := range sampleWorkloads {
		names = append(names, "pod/"+w.key(), "account/"+w.key())
	}
	return names
}

func (m *mesh) socket(w sampleWorkload) string { return m.layout.path("sockets", w.file()+".sock") }
func (m *mesh) token(name string) string       { return m.layout.path("tokens", name) }

func (m *mesh) openIssuers() error {
	var err error
	if m.workloads, err = openIssuer(workloadIssuerName, m.layout.path("issuer", "workloads.key"), jose.RS256); err != nil {
		return err
	}
	if m.users, err = openIssuer(userIssuerName, m.layout.path("issuer", "users.key"), jose.RS256); err != nil {
		return err
	}
	for _, i := range []struct {
		issuer *issuer
		file   string
	}{{m.workloads, "workloads.jwks"}, {m.users, "users.jwks"}} {
		keys, err := i.issuer.jwks()
		if err != nil {
			return fmt.Errorf("up: %w", err)
		}
		if err := writeFile(m.layout.path("issuer", i.file), keys, 0o644); err != nil {
			return err
		}
	}
	m.issuers = &issuers{now: m.now, log: m.log, files: m.tokenFiles()}
	return nil
}

func (m *mesh) tokenFiles() []tokenFile {
	files := []tokenFile{m.podToken("agent", systemNS, "castellan-agent")}
	for _, w := range sampleWorkloads {
		files = append(files, m.podToken(w.file(), w.namespace, w.account))
	}
	user := func(name string, groups []string, lifetime time.Duration) tokenFile {
		return tokenFile{
			path: m.token(name), issuer: m.users, audience: []string{"payments"}, lifetime: lifetime,
			claims: map[string]any{"sub": "alice", "groups": groups},
		}
	}
	return append(files,
		user("user-valid", []string{"finance", "staff"}, userTokenTTL),
		user("user-no-group", []string{"staff"}, userTokenTTL),
		user("user-expired", []string{"finance", "staff"}, -time.Hour))
}

// podToken describes a token of the shape the kubelet gives a pod.
func (m *mesh) podToken(file, namespace, account string) tokenFile {
	key := namespace + "/" + account
	type object map[string]any
	return tokenFile{
		path: m.token(file), issuer: m.workloads, lifetime: workloadTokenTTL,
		audience: []string{"castellan.dev", "istio-ca"},
		claims: map[string]any{
			"sub": "system:serviceaccount:" + namespace + ":" + account,
			"kubernetes.io": object{
				"namespace":      namespace,
				"serviceaccount": object{"name": account, "uid": m.state.UIDs["account/"+key]},
				"pod":            object{"name": account, "uid": m.state.UIDs["pod/"+key]},
				"node":           object{"name": nodeName, "uid": m.state.UIDs["node/"+nodeName]},
			},
		},
	}
}

// copySamples fills the policy directory at first start; what stands there later is the user's.
func (m *mesh) copySamples() error {
	if m.policyDir != m.layout.path("policy") {
		return nil
	}
	if _, err := os.Stat(m.policyDir); err == nil {
		return nil
	}
	keys, err := m.users.jwks()
	if err != nil {
		return fmt.Errorf("up: %w", err)
	}
	// Made under another name first: a start that is cut short copies again.
	tmp := m.policyDir + ".new"
	if err := os.RemoveAll(tmp); err != nil {
		return fmt.Errorf("up: %w", err)
	}
	err = fs.WalkDir(samples.Quickstart, "quickstart", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := samples.Quickstart.ReadFile(path)
		if err != nil {
			return err
		}
		data = exampleKeys.ReplaceAllLiteral(data, []byte("jwks: '"+string(keys)+"'"))
		return writeFile(filepath.Join(tmp, filepath.Base(path)), data, 0o644)
	})
	if err != nil {
		return fmt.Errorf("up: copy samples: %w", err)
	}
	if err := os.Rename(tmp, m.policyDir); err != nil {
		return fmt.Errorf("up: %w", err)
	}
	return nil
}

func (m *mesh) writeConfigs() error {
	header := func(kind string) config.Header { return config.Header{APIVersion: config.APIVersion, Kind: kind} }
	server := &config.Server{
		Header:       header("ServerConfig"),
		DataDir:      m.layout.path("server"),
		Listen:       m.state.addr("server/grpc"),
		HTTP:         m.state.addr("server/http"),
		BundleFile:   m.layout.path("bundle.pem"),
		ServingNames: []string{"localhost", "127.0.0.1"},
		CA:           config.CA{LeafTTL: config.Duration(m.ttl)},
		Attestation: config.Attestation{
			Issuers: []config.TokenIssuer{{
				Issuer: workloadIssuerName, Cluster: clusterName,
				JWKSFile: m.layout.path("issuer", "workloads.jwks"),
			}},
			AgentAccounts: []string{agentAccount},
			WorkloadsFile: m.layout.path("workloads.yaml"),
		},
		Discovery: config.Discovery{PolicyDir: m.policyDir},
		Mesh:      policy.Mesh{TrustDomain: m.trustDomain.Name()},
	}
	agent := &config.Agent{
		Header:      header("AgentConfig"),
		TrustDomain: m.trustDomain.Name(),
		Node:        nodeName, Cluster: clusterName,
		TokenFile: m.token("agent"),
		Server:    config.ServerTarget{Address: m.state.addr("server/grpc"), BundleFile: m.layout.path("bundle.pem")},
		Admin:     m.state.addr("agent/admin"),
	}
	for _, w := range sampleWorkloads {
		agent.Workloads = append(agent.Workloads, config.AgentWorkload{
			Namespace: w.namespace, ServiceAccount: w.account,
			Socket:    m.socket(w),
			UIDs:      []uint32{uint32(os.Getuid())},
			TokenFile: m.token(w.file()),
		})
		proxy := m.proxyConfig(w)
		proxy.Header = header("ProxyConfig")
		if err := writeYAML(m.layout.path("config", "proxy."+w.file()+".yaml"), proxy); err != nil {
			return err
		}
	}
	return errors.Join(
		writeYAML(m.layout.path("config", "server.yaml"), server),
		writeYAML(m.layout.path("config", "agent.yaml"), agent),
		m.writeWorkloads(),
	)
}

func (m *mesh) proxyConfig(w sampleWorkload) *config.Proxy {
	p := &config.Proxy{
		AgentSocket: m.socket(w),
		Inbound:     []config.Inbound{{Listen: m.state.addr(w.key() + "/inbound"), Port: appPort, App: m.state.addr(w.key() + "/app")}},
		Admin:       m.state.addr(w.key() + "/admin"),
	}
	for _, to := range sampleWorkloads {
		if to.service {
			p.Outbound = append(p.Outbound, config.Outbound{
				Listen: m.state.addr(w.key() + "/outbound/" + to.account), Service: to.key(), Port: servicePort,
			})
		}
	}
	return p
}

// writeWorkloads writes the file that stands for the cluster: pods and services.
// It is written once; what users change in it later stays, as with policies. One
// that tells of ports and UIDs no longer so is put aside.
func (m *mesh) writeWorkloads() error {
	path := m.layout.path("workloads.yaml")
	if _, err := os.Stat(path); err == nil {
		if !m.state.fresh {
			return nil
		}
		if err := os.Rename(path, path+".old"); err != nil {
			return fmt.Errorf("up: %w", err)
		}
	}
	var file struct {
		config.Header `json:",inline"`
		Workloads     []workloads.Workload `json:"workloads"`
		Services      []workloads.Service  `json:"services"`
	}
	file.Header = config.Header{APIVersion: config.APIVersion, Kind: "Workloads"}
	for _, w := range sampleWorkloads {
		file.Workloads = append(file.Workloads, workloads.Workload{
			Namespace: w.namespace, ServiceAccount: w.account,
			PodUID: m.state.UIDs["pod/"+w.key()], PodName: w.account, ServiceAccountUID: m.state.UIDs["account/"+w.key()],
			Node: nodeName, Labels: map[string]string{"app": w.account}, Address: "127.0.0.1",
			Ports: []workloads.Port{{Number: appPort, Protocol: "http"}},
		})
		if !w.service {
			continue
		}
		file.Services = append(file.Services, workloads.Service{
			Namespace: w.namespace, Name: w.account,
			Hosts: []string{w.account, w.account + "." + w.namespace, w.account + "." + w.namespace + ".svc", w.account + "." + w.namespace + ".svc.cluster.local"},
			Ports: []workloads.ServicePort{{Name: "http", Number: servicePort, Protocol: "http"}},
			Endpoints: []workloads.Endpoint{{
				Workload: m.state.UIDs["pod/"+w.key()],
				Ports:    map[uint16]uint16{servicePort: uint16(m.state.Ports[w.key()+"/inbound"])},
			}},
		})
	}
	return writeYAML(path, file)
}

func writeYAML(path string, v any) error {
	raw, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("up: %w", err)
	}
	out, err := yaml.JSONToYAML(raw)
	if err != nil {
		return fmt.Errorf("up: %w", err)
	}
	return writeFile(path, out, 0o600)
}

// stages lists the parts in the order they start; those of one stage start together.
func (m *mesh) stages() [][]process {
	bin := func(name string) string { return filepath.Join(m.binDir, name) }
	conf := func(name string) []string { return []string{"-config", m.layout.path("config", name+".yaml")} }
	ready := func(port string) string { return "http://" + m.state.addr(port) + "/readyz" }
	first := []process{{"server", bin("castellan-server"), conf("server"), ready("server/http")}}
	var proxies []process
	for _, w := range sampleWorkloads {
		app := m.state.addr(w.key() + "/app")
		first = append(first, process{w.key() + "/app", m.self, []string{"sample-app", "--listen", app, "--name", w.key()}, "http://" + app + "/"})
		proxies = append(proxies, process{w.key() + "/proxy", bin("castellan-proxy"), conf("proxy." + w.file()), ready(w.key() + "/admin")})
	}
	agent := process{"agent", bin("castellan-agent"), conf("agent"), ready("agent/admin")}
	return [][]process{first, slices.Concat([]process{agent}, proxies)}
}
