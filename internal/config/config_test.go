package config_test

import (
	"bytes"
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"sigs.k8s.io/yaml"

	"castellan.dev/api/policy"
	"castellan.dev/internal/config"
)

const header = "apiVersion: castellan.dev/v1alpha1\nkind: "

// load reads text as a file of the given configuration.
func load(t *testing.T, text string, cfg interface{ Validate() error }) error {
	t.Helper()
	path := filepath.Join(t.TempDir(), "c.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	err := config.Load(path, cfg)
	if err != nil && !strings.HasPrefix(err.Error(), "config: "+path+": ") {
		t.Errorf("%v does not name the file", err)
	}
	return err
}

// row is a change to a good configuration, as JSON merged into it, and what is
// said of it.
type row struct {
	change string
	want   string // exact, after the file's name; "" is good
}

// merge lays a change over the good configuration; null removes.
func merge(t *testing.T, good, change string) string {
	t.Helper()
	var base, over map[string]any
	if err := yaml.Unmarshal([]byte(good), &base); err != nil {
		t.Fatal(err)
	}
	if err := yaml.Unmarshal([]byte(change), &over); err != nil {
		t.Fatal(err)
	}
	var lay func(into, from map[string]any)
	lay = func(into, from map[string]any) {
		for k, v := range from {
			sub, isMap := v.(map[string]any)
			below, isBelow := into[k].(map[string]any)
			switch {
			case v == nil:
				delete(into, k)
			case isMap && isBelow:
				lay(below, sub)
			default:
				into[k] = v
			}
		}
	}
	lay(base, over)
	out, err := json.Marshal(base)
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

func runRows(t *testing.T, good string, rows map[string]row, fresh func() interface{ Validate() error }) {
	for name, tt := range rows {
		t.Run(name, func(t *testing.T) {
			err := load(t, merge(t, good, tt.change), fresh())
			got := ""
			if err != nil {
				_, got, _ = strings.Cut(err.Error(), "c.yaml: ")
			}
			if got != tt.want {
				t.Errorf("error %q, want %q", got, tt.want)
			}
		})
	}
}

const goodServer = header + `ServerConfig
dataDir: /var/lib/castellan
attestation: {issuers: [{issuer: "https://k8s.example", jwksFile: /keys.json}]}
`

func TestServer(t *testing.T) {
	long := strings.Repeat("a", 108)
	runRows(t, goodServer, map[string]row{
		"good":                {`{}`, ""},
		"no apiVersion":       {`{apiVersion: null}`, `apiVersion: "", want "castellan.dev/v1alpha1"`},
		"another apiVersion":  {`{apiVersion: castellan.dev/v2}`, `apiVersion: "castellan.dev/v2", want "castellan.dev/v1alpha1"`},
		"another kind":        {`{kind: ProxyConfig}`, `kind: "ProxyConfig", want "ServerConfig"`},
		"no data directory":   {`{dataDir: null}`, `dataDir: required`},
		"listen":              {`{listen: "15012"}`, `listen: address 15012: missing port in address`},
		"http":                {`{http: localhost}`, `http: address localhost: missing port in address`},
		"admin socket":        {`{adminSocket: ` + long + `}`, `adminSocket: "` + long + `" has 108 bytes and the kernel takes 107; choose a shorter directory`},
		"long data directory": {`{dataDir: ` + long + `}`, `adminSocket: "` + long + `/admin.sock" has 119 bytes and the kernel takes 107; choose a shorter directory`},
		"log level":           {`{log: {level: loud}}`, `log.level: "loud", want debug, info, warn or error`},
		"log format":          {`{log: {format: xml}}`, `log.format: "xml", want json or text`},
		"rates":               {`{rateLimit: {podBurst: -1}}`, `rateLimit: limits must not be negative`},
		"rates, overall":      {`{rateLimit: {totalPerSecond: -0.5}}`, `rateLimit: limits must not be negative`},
		"a number as string":  {`{ca: {leafTTL: 60}}`, `a duration is a string such as "90s" or "1h"`},
		"no duration":         {`{ca: {leafTTL: 1 hour}}`, `time: unknown unit " hour" in duration "1 hour"`},
		"unknown field":       {`{mesh: {trustdomain: x}}`, `unknown field "mesh.trustdomain"`},

		"no issuers":          {`{attestation: {issuers: []}}`, `attestation.issuers: at least one is needed; without it nobody can be attested`},
		"issuer without name": {`{attestation: {issuers: [{jwksFile: /k}]}}`, `attestation.issuers[0].issuer: required`},
		"issuer twice":        {`{attestation: {issuers: [{issuer: a, oidc: true}, {issuer: a, oidc: true}]}}`, `attestation.issuers[1].issuer: "a" is listed twice`},
		"issuer without keys": {`{attestation: {issuers: [{issuer: a}]}}`, `attestation.issuers[0]: set exactly one of jwksFile, jwksUri and oidc`},
		"issuer, keys twice":  {`{attestation: {issuers: [{issuer: a, oidc: true, jwksUri: "https://x"}]}}`, `attestation.issuers[0]: set exactly one of jwksFile, jwksUri and oidc`},
		"agent accounts":      {`{attestation: {agentAccounts: [a/b, c]}}`, `attestation.agentAccounts[1]: identity: "c" is not of the form NAMESPACE/ACCOUNT`},
		"direct callers":      {`{attestation: {directCallers: [A/b]}}`, `attestation.directCallers[0]: identity: "A" is not a namespace (an RFC 1123 label is wanted)`},
		"node accounts":       {`{attestation: {trustedNodeAccounts: ["*"]}}`, `attestation.trustedNodeAccounts[0]: identity: "*" is not of the form NAMESPACE/ACCOUNT`},

		"mesh, trust domain like an address": {`{mesh: {trustDomain: 10.0.0.1}}`, `mesh.trustDomain: identity: trust domain "10.0.0.1" looks like an IP address; choose a name such as "cluster.local"`},
		"mesh, trust domain, empty label":    {`{mesh: {trustDomain: a..b}}`, `mesh.trustDomain: identity: trust domain "a..b" has an empty label; remove the extra dot`},
		"mesh, alias":                        {`{mesh: {trustDomainAliases: [old, "x/y"]}}`, `mesh.trustDomainAliases[1]: identity: trust domain "x/y": give the bare name, without scheme or path`},
		"mesh, root namespace":               {`{mesh: {rootNamespace: Ops}}`, `mesh.rootNamespace: identity: "Ops" is not a namespace (an RFC 1123 label is wanted)`},
		"mesh, normalization":                {`{mesh: {pathNormalization: base}}`, `mesh.pathNormalization: "base", want NONE, BASE, MERGE_SLASHES or DECODE_AND_MERGE_SLASHES`},
		"mesh, outbound":                     {`{mesh: {outboundPolicy: ANY}}`, `mesh.outboundPolicy: "ANY", want REGISTRY_ONLY or ALLOW_ANY`},
		"mesh, proxies":                      {`{mesh: {numTrustedProxies: -1}}`, `mesh.numTrustedProxies: -1, want 0 to 64`},
		"mesh, more proxies":                 {`{mesh: {numTrustedProxies: 65}}`, `mesh.numTrustedProxies: 65, want 0 to 64`},
		"mesh, nameless provider":            {`{mesh: {extensionProviders: [{address: "x:1"}]}}`, `mesh.extensionProviders[0].name: required`},
		"mesh, provider twice":               {`{mesh: {extensionProviders: [{name: a, address: "x:1"}, {name: a, address: "x:1"}]}}`, `mesh.extensionProviders[1].name: "a" is listed twice`},
		"mesh, provider's address":           {`{mesh: {extensionProviders: [{name: a, address: x}]}}`, `mesh.extensionProviders[0].address: address x: missing port in address`},
		"mesh, provider's timeout":           {`{mesh: {extensionProviders: [{name: a, address: "x:1", timeout: soon}]}}`, `mesh.extensionProviders[0].timeout: time: invalid duration "soon"`},
		"mesh, no time for the provider":     {`{mesh: {extensionProviders: [{name: a, address: "x:1", timeout: 0s}]}}`, `mesh.extensionProviders[0].timeout: not a positive duration`},
		"mesh, all of it":                    {`{mesh: {trustDomainAliases: [old.example], rootNamespace: ops, pathNormalization: MERGE_SLASHES, outboundPolicy: ALLOW_ANY, numTrustedProxies: 64, extensionProviders: [{name: a, address: "x:1", timeout: 1s}], jwks: {allow: [http, 10.0.0.0/8, "fd00::/8"]}}}`, ""},
		"mesh, fetching":                     {`{mesh: {jwks: {allow: [http, "*"]}}}`, `mesh.jwks.allow[1]: "*", want an address range such as "10.0.0.0/8", or "http"`},

		"trust-10 leaf too short":              {`{ca: {leafTTL: 4s}}`, `ca.leafTTL: 4s is shorter than 5s`},
		"trust-10 leaf negative":               {`{ca: {leafTTL: -1h}}`, `ca.leafTTL: -1h0m0s is shorter than 5s`},
		"trust-10 shortest leaf":               {`{ca: {leafTTL: 5s}}`, ""},
		"trust-10 longest leaf over a day":     {`{ca: {maxLeafTTL: 25h, intermediateTTL: 80h}}`, `ca.maxLeafTTL: 25h0m0s is longer than 24h`},
		"trust-10 leaf over the longest":       {`{ca: {leafTTL: 2h, maxLeafTTL: 1h}}`, `ca.maxLeafTTL: 1h0m0s is shorter than ca.leafTTL (2h0m0s)`},
		"trust-10 no room for intermediates":   {`{ca: {intermediateTTL: 47h}}`, `ca.intermediateTTL: 47h0m0s must be at least twice ca.maxLeafTTL (24h0m0s), so that it can be rotated`},
		"trust-10 just enough room":            {`{ca: {intermediateTTL: 48h, rootTTL: 96h}}`, ""},
		"trust-10 no room for roots":           {`{ca: {intermediateTTL: 48h, rootTTL: 95h}}`, `ca.rootTTL: 95h0m0s must be at least twice ca.intermediateTTL (48h0m0s), so that it can be rotated`},
		"trust-10 no room, beyond all numbers": {`{ca: {intermediateTTL: 2500000h}}`, `ca.rootTTL: 8760h0m0s must be at least twice ca.intermediateTTL (2500000h0m0s), so that it can be rotated`},
		"trust-10 tokens outlive leaves":       {`{ca: {jwtTTL: 25h}}`, `ca.jwtTTL: 25h0m0s is longer than ca.maxLeafTTL (24h0m0s)`},
		"trust-10 negative backdate":           {`{ca: {backdate: -1s}}`, `ca: durations must not be negative`},
		"trust-10 negative token":              {`{ca: {jwtTTL: -1s}}`, `ca: durations must not be negative`},
	}, func() interface{ Validate() error } { return &config.Server{} })
}

func TestServerDefaults(t *testing.T) {
	var s config.Server
	if err := load(t, goodServer, &s); err != nil {
		t.Fatal(err)
	}
	if s.Listen != ":15012" || s.HTTP != ":15014" || s.AdminSocket != "/var/lib/castellan/admin.sock" || s.Mesh.TrustDomain != "cluster.local" ||
		s.Mesh.RootNamespace != "castellan-system" || s.Mesh.PathNormalization != policy.NormalizeBase || s.Mesh.OutboundPolicy != policy.OutboundRegistryOnly {
		t.Errorf("%+v", s)
	}
	want := config.CA{
		LeafTTL: config.Duration(time.Hour), MaxLeafTTL: config.Duration(24 * time.Hour), IntermediateTTL: config.Duration(7 * 24 * time.Hour),
		RootTTL: config.Duration(365 * 24 * time.Hour), Backdate: config.Duration(30 * time.Second), JWTTTL: config.Duration(5 * time.Minute),
	}
	if s.CA != want {
		t.Errorf("%+v", s.CA)
	}
	if s.RateLimit != (config.RateLimit{PodBurst: 100, PodPerSecond: 2, TotalBurst: 20000, TotalPerSecond: 5000}) {
		t.Errorf("%+v", s.RateLimit)
	}
	i := s.Attestation.Issuers[0]
	if i.Cluster != "Kubernetes" || !slices.Equal(i.Audiences, []string{"castellan.dev", "istio-ca"}) || !slices.Equal(s.Attestation.AgentAccounts, []string{"castellan-system/castellan-agent"}) ||
		len(s.Attestation.DirectCallers)+len(s.Attestation.TrustedNodeAccounts) != 0 {
		t.Errorf("%+v", s.Attestation)
	}
}

func TestServingHosts(t *testing.T) {
	s := config.Server{ServingNames: []string{"localhost", "127.0.0.1", "::1", "castellan.svc"}}
	names, ips := s.ServingHosts()
	if !slices.Equal(names, []string{"localhost", "castellan.svc"}) || !slices.Equal(ips, []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("::1")}) {
		t.Errorf("%v %v", names, ips)
	}
}

const goodAgent = header + `AgentConfig
trustDomain: cluster.local
node: local
tokenFile: /token
server: {address: "server.example:15012", bundleFile: /roots.pem}
workloads:
- {namespace: shop, serviceAccount: orders, socket: /run/a.sock, uids: [1000], tokenFile: /a}
`

func TestAgent(t *testing.T) {
	long := "/" + strings.Repeat("a", 107)
	workload := func(change string) string {
		return "{workloads: [" + merge(t, "{namespace: shop, serviceAccount: orders, socket: /s, uids: [0], tokenFile: /t}", change) + "]}"
	}
	runRows(t, goodAgent, map[string]row{
		"good":            {`{}`, ""},
		"kind":            {`{kind: ServerConfig}`, `kind: "ServerConfig", want "AgentConfig"`},
		"trust domain":    {`{trustDomain: null}`, `trustDomain: identity: trust domain "": trust domain is missing`},
		"node":            {`{node: null}`, `node: required`},
		"token":           {`{tokenFile: ""}`, `tokenFile: required`},
		"server":          {`{server: {address: null}}`, `server.address: required`},
		"server's port":   {`{server: {address: x}}`, `server.address: address x: missing port in address`},
		"bundle":          {`{server: {bundleFile: null}}`, `server.bundleFile: required`},
		"admin":           {`{admin: x}`, `admin: address x: missing port in address`},
		"log":             {`{log: {level: x}}`, `log.level: "x", want debug, info, warn or error`},
		"no workloads":    {`{workloads: null}`, ""},
		"namespace":       {workload(`{namespace: null}`), `workloads[0].namespace/serviceAccount: identity: "" is not a namespace (an RFC 1123 label is wanted)`},
		"service account": {workload(`{serviceAccount: A}`), `workloads[0].namespace/serviceAccount: identity: "A" is not a service account (an RFC 1123 subdomain is wanted)`},
		"no token":        {workload(`{tokenFile: null}`), `workloads[0].tokenFile: required`},
		"no socket":       {workload(`{socket: null}`), `workloads[0].socket: required`},
		"long socket":     {workload(`{socket: "` + long + `"}`), `workloads[0].socket: "` + long + `" has 108 bytes and the kernel takes 107; choose a shorter directory`},
		"longest socket":  {workload(`{socket: "` + long[:107] + `"}`), ""},
		"nobody may":      {workload(`{uids: []}`), `workloads[0].uids: an empty list admits nobody; list the uids that may connect`},
		"uid":             {workload(`{uids: [-1]}`), `workloads.uids: number -1 given, want a whole number from 0 to 4294967295`},
		"socket twice":    {`{workloads: [{namespace: a, serviceAccount: b, socket: /s, uids: [0], tokenFile: /t}, {namespace: a, serviceAccount: c, socket: /s, uids: [0], tokenFile: /t}]}`, `workloads[1].socket: "/s" is used twice`},
		"unknown field":   {workload(`{uid: 0}`), `unknown field "workloads[0].uid"`},
	}, func() interface{ Validate() error } { return &config.Agent{} })

	var a config.Agent
	if err := load(t, goodAgent, &a); err != nil || a.Cluster != "Kubernetes" || a.Admin != "127.0.0.1:15015" || a.Server.Name != "server.example" {
		t.Errorf("%+v, %v", a, err)
	}
}

const goodProxy = header + `ProxyConfig
agentSocket: /run/a.sock
inbound: [{listen: "127.0.0.1:15006", app: "127.0.0.1:8080"}]
outbound: [{listen: "127.0.0.1:15001", service: shop/orders}]
`

func TestProxy(t *testing.T) {
	rows := map[string]row{
		"good":               {`{}`, ""},
		"kind":               {`{kind: Proxy}`, `kind: "Proxy", want "ProxyConfig"`},
		"socket":             {`{agentSocket: null}`, `agentSocket: required`},
		"no listeners":       {`{inbound: null, outbound: null}`, `inbound, outbound, capture: at least one listener is needed`},
		"inbound only":       {`{outbound: null}`, ""},
		"outbound only":      {`{inbound: null}`, ""},
		"listen":             {`{inbound: [{listen: x, app: "a:1"}]}`, `inbound[0].listen: address x: missing port in address`},
		"app":                {`{inbound: [{listen: "a:1", app: x}]}`, `inbound[0].app: address x: missing port in address`},
		"port":               {`{inbound: [{listen: "a:1", app: "a:1", port: 65536}]}`, `inbound.port: number 65536 given, want a whole number from 0 to 65535`},
		"out listen":         {`{outbound: [{listen: x, service: a/b}]}`, `outbound[0].listen: address x: missing port in address`},
		"service":            {`{outbound: [{listen: "a:1"}]}`, `outbound[0].service: "", want NAMESPACE/NAME`},
		"bare service":       {`{outbound: [{listen: "a:1", service: orders}]}`, `outbound[0].service: "orders", want NAMESPACE/NAME`},
		"half a service":     {`{outbound: [{listen: "a:1", service: shop/}]}`, `outbound[0].service: "shop/", want NAMESPACE/NAME`},
		"longer service":     {`{outbound: [{listen: "a:1", service: a/b/c}]}`, `outbound[0].service: "a/b/c", want NAMESPACE/NAME`},
		"admin":              {`{admin: "15020"}`, `admin: address 15020: missing port in address`},
		"drain":              {`{drainTimeout: -1s}`, `drainTimeout: must not be negative`},
		"log":                {`{log: {format: x}}`, `log.format: "x", want json or text`},
		"policy is not here": {`{mesh: {}}`, `unknown field "mesh"`},
	}
	// A negative limit would be none.
	for _, name := range []string{"maxHeaderBytes", "maxConnections", "maxPerSource", "maxHandshakes", "maxStreams"} {
		rows[name] = row{`{limits: {` + name + `: -1}}`, `limits.` + name + `: must not be negative`}
	}
	for _, name := range []string{"handshakeTimeout", "headerTimeout", "idleTimeout", "connectTimeout", "responseTimeout", "streamIdleTimeout"} {
		rows[name] = row{`{limits: {` + name + `: -1s}}`, `limits.` + name + `: must not be negative`}
	}
	runRows(t, goodProxy, rows, func() interface{ Validate() error } { return &config.Proxy{} })

	var p config.Proxy
	if err := load(t, goodProxy, &p); err != nil {
		t.Fatal(err)
	}
	// One source may not take everything; how much is tuned by what a connection costs.
	if p.Limits.MaxPerSource <= 0 || p.Limits.MaxPerSource >= p.Limits.MaxConnections {
		t.Errorf("%d of %d connections for one source", p.Limits.MaxPerSource, p.Limits.MaxConnections)
	}
	p.Limits.MaxPerSource = 0
	if p.Admin != ":15020" || p.AccessLog != "stdout" || p.DrainTimeout != config.Duration(5*time.Second) || p.Limits != (config.ProxyLimits{
		MaxHeaderBytes: 32768, MaxConnections: 8000, MaxHandshakes: 256, MaxStreams: 100,
		HandshakeTimeout: config.Duration(5 * time.Second), HeaderTimeout: config.Duration(10 * time.Second), IdleTimeout: config.Duration(5 * time.Minute),
		ConnectTimeout: config.Duration(5 * time.Second), ResponseTimeout: config.Duration(time.Minute), StreamIdleTimeout: config.Duration(5 * time.Minute),
	}) {
		t.Errorf("%+v", p)
	}
}

func TestLoadFile(t *testing.T) {
	var p config.Proxy
	dir := t.TempDir()
	if err := config.Load(dir+"/none.yaml", &p); err == nil || err.Error() != "config: open "+dir+"/none.yaml: no such file or directory" {
		t.Errorf("%v", err)
	}
	if err := config.Load(dir, &p); err == nil || !strings.Contains(err.Error(), "is a directory") {
		t.Errorf("%v", err)
	}
	if err := os.WriteFile(dir+"/big.yaml", bytes.Repeat([]byte("# padding\n"), 1<<19), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := config.Load(dir+"/big.yaml", &p); err == nil || err.Error() != "config: "+dir+"/big.yaml is larger than 4194304 bytes" {
		t.Errorf("%v", err)
	}
	for name, text := range map[string]string{"empty": "", "comment": "# nothing\n", "list": "- a\n", "scalar": "a", "tab": "\ta: b", "half": "a: [", "binary": "\x00\x01"} {
		if err := load(t, text, &config.Proxy{}); err == nil {
			t.Errorf("%s is accepted", name)
		}
	}
}

func TestDuration(t *testing.T) {
	var d config.Duration
	for in, want := range map[string]time.Duration{`"90s"`: 90 * time.Second, `"1h"`: time.Hour, `"0"`: 0, `"-1m"`: -time.Minute} {
		if err := json.Unmarshal([]byte(in), &d); err != nil || time.Duration(d) != want {
			t.Errorf("%s: %v, %v", in, time.Duration(d), err)
		}
	}
	for in, want := range map[string]string{`90`: `a duration is a string such as "90s" or "1h"`, `null`: "", `"x"`: `time: invalid duration "x"`, `{}`: `a duration is a string such as "90s" or "1h"`} {
		err := json.Unmarshal([]byte(in), &d)
		if want == "" {
			continue // encoding/json: null leaves the value as it is, or refuses it
		}
		if err == nil || err.Error() != want {
			t.Errorf("%s: %v, want %q", in, err, want)
		}
	}
	out, err := json.Marshal(config.Duration(90 * time.Second))
	if err != nil || string(out) != `"1m30s"` {
		t.Errorf("%s, %v", out, err)
	}
	if config.Duration(0).Or(time.Second) != time.Second || config.Duration(time.Hour).Or(time.Second) != time.Hour {
		t.Error("Or")
	}
}

// Whatever stands in a file: an error or a valid configuration, never a panic.
func FuzzUnmarshal(f *testing.F) {
	for _, s := range []string{goodServer, goodAgent, goodProxy, "a: &x [*x]", "---\n---\n", "a: {b: {c: 1}}", "? [a]: b"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, cfg := range []interface{ Validate() error }{&config.Server{}, &config.Agent{}, &config.Proxy{}} {
			if config.Unmarshal(data, cfg) == nil {
				_ = cfg.Validate()
			}
		}
	})
}

// On Kubernetes the agent knows its server's Service without DNS.
func TestAgentFallback(t *testing.T) {
	t.Setenv("CASTELLAN_SERVER_SERVICE_HOST", "fd00::1")
	agent := func(csi *config.AgentCSI) *config.Agent {
		a := &config.Agent{
			TrustDomain: "cluster.local", Node: "n", TokenFile: "/t", CSI: csi,
			Server: config.ServerTarget{Address: "castellan-server.castellan-system.svc:15012", BundleFile: "/b"},
		}
		a.APIVersion, a.Kind = "castellan.dev/v1alpha1", "AgentConfig"
		return a
	}
	on, off := agent(&config.AgentCSI{}), agent(nil)
	for _, a := range []*config.Agent{on, off} {
		if err := a.Validate(); err != nil {
			t.Fatal(err)
		}
	}
	if on.Server.Fallback != "[fd00::1]:15012" || on.Server.Name != "castellan-server.castellan-system.svc" || off.Server.Fallback != "" {
		t.Errorf("%+v %+v", on.Server, off.Server)
	}
}
