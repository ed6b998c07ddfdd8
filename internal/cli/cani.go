package cli

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"castellan.dev/api/policy"
	"castellan.dev/authz"
	"castellan.dev/discovery"
	"castellan.dev/identity"
	"castellan.dev/internal/up"
	"castellan.dev/internal/workloads"
)

// sampleAppPort is the workload port where nothing else is known: that of the sample mesh.
const sampleAppPort = 8080

// canI is what was asked.
type canI struct {
	from, to           string
	tcp                bool
	method, target     string
	port               uint16
	host               string
	headers            []string
	jwtFile            string
	sourceIP, remoteIP string
	sni                string
	toLabels           []string
	meshFile           string
	files              []string
	upPath             string
	upGiven            bool
}

func (e *env) canICommand() *cobra.Command {
	q := &canI{}
	var explain bool
	cmd := &cobra.Command{
		Use:   "can-i --from WHO --to WHOM (METHOD /path | --tcp) (-f FILE_OR_DIR… | --up UP.JSON)",
		Short: "Decide one request as the proxy would, and say why",
		Long: `Take the whole decision of the receiving proxy: mutual TLS mode, normalisation of the
path, end-user tokens, policy. Exit code 0 allowed, 2 denied, 3 when what was asked or a
policy is invalid.

--from is NAMESPACE/ACCOUNT, a SPIFFE ID, or "none" for a caller without a certificate.
--to is NAMESPACE/ACCOUNT, or with a running mesh also a service ("orders", "shop/orders").
Without a running mesh the receiver is labelled app=ACCOUNT unless --to-labels says otherwise.`,
		Example: `  castellan authz can-i --from shop/frontend --to orders GET /
  castellan authz can-i --from none --to shop/payments POST /pay --jwt token -f policies/ --explain`,
		Args: cobra.MaximumNArgs(2),
	}
	f := cmd.Flags()
	f.StringVar(&q.from, "from", "", "caller (required)")
	f.StringVar(&q.to, "to", "", "receiver (required)")
	f.BoolVar(&q.tcp, "tcp", false, "a TCP connection instead of a request")
	f.Uint16Var(&q.port, "port", 0, "workload port (default: the one the receiver declares)")
	f.StringVar(&q.host, "host", "", "Host header (default: the receiver's)")
	f.StringArrayVar(&q.headers, "header", nil, "request header, k=v (repeats)")
	f.StringVar(&q.jwtFile, "jwt", "", "file with an end-user token, sent as Authorization: Bearer")
	f.StringVar(&q.sourceIP, "source-ip", "127.0.0.1", "address the connection comes from")
	f.StringVar(&q.remoteIP, "remote-ip", "", "original client's address, as trusted proxies told it (default: --source-ip)")
	f.StringVar(&q.sni, "sni", "", "server name of the TLS handshake")
	f.StringArrayVar(&q.toLabels, "to-labels", nil, "label of the receiver, k=v (repeats)")
	f.StringVar(&q.meshFile, "mesh", "", "mesh settings: YAML with the keys of `mesh:` at top level")
	f.StringArrayVarP(&q.files, "filename", "f", nil, "file or directory of policies, - for standard input (repeats)")
	f.BoolVar(&explain, "explain", false, "say how the decision came about, step by step")
	upPath := upFlag(cmd)
	formats := []string{"table", "json", "yaml"}
	format := outputFlag(cmd, formats...)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := checkOutput(*format, formats...); err != nil {
			return err
		}
		q.upPath, q.upGiven = *upPath, cmd.Flags().Changed("up")
		if err := q.request(args); err != nil {
			return err
		}
		setting, err := e.setting(q)
		if err != nil {
			return err
		}
		answer, err := decide(q, setting)
		if err != nil {
			return err
		}
		if !explain {
			answer.Steps = nil
		}
		if *format != "table" {
			err = writeData(e.out, *format, answer)
		} else {
			err = answer.print(e.out)
		}
		if err == nil && !answer.Allowed {
			err = errNegative
		}
		return err
	}
	return cmd
}

// request reads the positional arguments.
func (q *canI) request(args []string) error {
	if q.from == "" || q.to == "" {
		return invalidf("--from and --to are required")
	}
	switch {
	case q.tcp && len(args) > 0:
		return invalidf("--tcp takes no method and path")
	case !q.tcp && len(args) != 2:
		return invalidf("give METHOD and /path, or --tcp")
	case q.tcp && (q.jwtFile != "" || len(q.headers) > 0 || q.host != ""):
		return invalidf("--tcp has no token, headers or host")
	}
	if !q.tcp {
		q.method, q.target = args[0], args[1]
	}
	return nil
}

// setting is everything but the request that the decision hangs on.
type setting struct {
	mesh     policy.Mesh
	domain   spiffeid.TrustDomain
	docs     []policy.Document
	caller   spiffeid.ID
	workload authz.Workload
	port     uint16
	host     string
}

// setting reads policies, mesh and receiver.
func (e *env) setting(q *canI) (*setting, error) {
	s := &setting{}
	var known *workloads.File
	paths, trustDomain := q.files, ""
	if len(q.files) == 0 || q.upGiven {
		file, err := up.ReadFile(q.upPath)
		if err != nil {
			if len(q.files) == 0 && !q.upGiven {
				return nil, invalidf("%w; or give policies with -f", err)
			}
			return nil, err
		}
		data, err := os.ReadFile(up.WorkloadsFile(q.upPath))
		if err != nil {
			return nil, err
		}
		if known, err = workloads.Parse(data); err != nil {
			return nil, err
		}
		trustDomain = file.TrustDomain
		if len(paths) == 0 {
			paths = []string{file.PolicyDir}
		}
	}
	var err error
	if s.mesh, err = loadMesh(q.meshFile, trustDomain); err != nil {
		return nil, err
	}
	if s.domain, err = identity.ParseTrustDomain(s.mesh.TrustDomain); err != nil {
		return nil, invalidf("mesh: trustDomain: %w", err)
	}
	docs, err := e.readPolicies(paths, s.mesh)
	if err != nil {
		return nil, err
	}
	if err := refusal(docs); err != nil {
		var refused []discovery.FileDocument
		for _, d := range docs {
			if d.Refused() {
				refused = append(refused, d)
			}
		}
		if perr := e.explainRefusal(refused); perr != nil {
			return nil, perr
		}
		return nil, err
	}
	for _, d := range docs {
		s.docs = append(s.docs, d.Document)
	}
	if s.caller, err = parseCaller(q.from, s.domain); err != nil {
		return nil, err
	}
	return s, s.receiver(q, known)
}

func (e *env) explainRefusal(docs []discovery.FileDocument) error {
	talk := &env{out: e.err}
	return talk.printDocuments(docs, "table")
}

// parseCaller reads --from; the zero ID is a caller without a certificate.
func parseCaller(from string, td spiffeid.TrustDomain) (spiffeid.ID, error) {
	if from == "none" {
		return spiffeid.ID{}, nil
	}
	if strings.HasPrefix(from, "spiffe://") {
		id, err := spiffeid.FromString(from)
		if err != nil {
			return id, invalidf("--from %q: %w", from, err)
		}
		if id.Path() == "" {
			return id, invalidf("--from %q names a trust domain, not a workload", from)
		}
		return id, nil
	}
	account, err := identity.ParseAccount(from)
	if err != nil {
		return spiffeid.ID{}, invalidf("--from: %w; want NAMESPACE/ACCOUNT, a SPIFFE ID, or none", err)
	}
	w, err := identity.New(td, account)
	if err != nil {
		return spiffeid.ID{}, invalidf("--from: %w", err)
	}
	return w.ID(), nil
}

// receiver finds who --to is: a declared workload, one behind a service, or, with
// no mesh to ask, an account by its name.
func (s *setting) receiver(q *canI, known *workloads.File) error {
	labels, err := parsePairs("--to-labels", q.toLabels, "=")
	if err != nil {
		return err
	}
	found, host, err := findReceiver(q.to, known)
	if err != nil {
		return err
	}
	ports := map[uint16]string{}
	account := identity.Account{}
	if found != nil {
		if account, err = identity.NewAccount(found.Namespace, found.ServiceAccount); err != nil {
			return err
		}
		s.workload.Labels = found.Labels
		for _, p := range found.Ports {
			ports[p.Number] = p.Protocol
			if s.port == 0 {
				s.port = p.Number
			}
		}
	} else {
		if account, err = identity.ParseAccount(q.to); err != nil {
			return invalidf("--to: %w; services are known only with a running mesh (--up)", err)
		}
		s.workload.Labels = map[string]string{"app": account.Name()}
		host = account.Name() + "." + account.Namespace()
		s.port = sampleAppPort
	}
	if len(labels) > 0 {
		s.workload.Labels = map[string]string{}
		for _, l := range labels {
			s.workload.Labels[l[0]] = l[1]
		}
	}
	if q.port != 0 {
		s.port = q.port
	}
	if s.host = host; q.host != "" {
		s.host = q.host
	}
	s.workload.TrustDomain, s.workload.Account, s.workload.Ports = s.domain, account, ports
	return nil
}

// findReceiver looks --to up among the declared workloads and services; nil where
// there is no mesh to ask.
func findReceiver(to string, known *workloads.File) (*workloads.Workload, string, error) {
	if known == nil {
		return nil, "", nil
	}
	for i, w := range known.Workloads {
		if to == w.Namespace+"/"+w.ServiceAccount {
			return &known.Workloads[i], w.ServiceAccount + "." + w.Namespace, nil
		}
	}
	var matches []workloads.Service
	for _, svc := range known.Services {
		if to == svc.Namespace+"/"+svc.Name || to == svc.Name || slices.Contains(svc.Hosts, to) {
			matches = append(matches, svc)
		}
	}
	switch {
	case len(matches) == 0:
		return nil, "", invalidf("--to %q is neither a workload nor a service of this mesh", to)
	case len(matches) > 1:
		return nil, "", invalidf("--to %q is a service in several namespaces; give NAMESPACE/SERVICE", to)
	}
	for _, ep := range matches[0].Endpoints {
		for i, w := range known.Workloads {
			if w.PodUID == ep.Workload {
				return &known.Workloads[i], matches[0].Name + "." + matches[0].Namespace, nil
			}
		}
	}
	return nil, "", invalidf("--to %q is a service without workloads", to)
}

// parsePairs reads k=v arguments.
func parsePairs(flag string, args []string, sep string) ([][2]string, error) {
	var out [][2]string
	for _, a := range args {
		k, v, ok := strings.Cut(a, sep)
		if !ok || k == "" {
			return nil, invalidf("%s %q: want k%sv", flag, a, sep)
		}
		out = append(out, [2]string{k, v})
	}
	return out, nil
}

func parseIP(flag, s string) (netip.Addr, error) {
	if s == "" {
		return netip.Addr{}, nil
	}
	ip, err := netip.ParseAddr(s)
	if err != nil {
		return ip, invalidf("%s %q: not an IP address", flag, s)
	}
	return ip, nil
}

// readToken reads the file of --jwt.
func readToken(path string) (string, error) {
	data, err := os.ReadFile(filepath.Clean(path))
	if err != nil {
		return "", fmt.Errorf("--jwt: %w", err)
	}
	return strings.TrimSpace(string(data)), nil
}

func portText(port uint16) string { return strconv.Itoa(int(port)) }
