package cli

import (
	"cmp"
	"context"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"castellan.dev/api/policy"
)

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
	explain            bool
	// any: no request was given, so the obvious one is asked.
	any bool

	sourceGiven bool
	// What request made of the above.
	source, remote netip.Addr
}

func (e *env) canICommand() *cobra.Command {
	q := &canI{}
	cmd := &cobra.Command{
		Use:   "can-i --from WHO --to WHOM [METHOD /path | --tcp] [-f FILE_OR_DIR… | --up UP.JSON | -n NAMESPACE]",
		Short: "Decide one request as the proxy would, and say why",
		Long: `Take the whole decision of the receiving proxy: mutual TLS mode, normalisation of the
path, end-user tokens, policy. Exit code 0 allowed, 2 denied, 3 when what was asked or a
policy is invalid. Providers of CUSTOM policies are not asked: that is a denial. Without a
request, GET / is asked, or a connection where the port is declared for something else
than HTTP.

--from is NAMESPACE/ACCOUNT, a SPIFFE ID, or "none" for a caller without a certificate.
--to is NAMESPACE/ACCOUNT, or where there is a mesh to ask also a service ("orders",
"shop/orders"), and on a cluster a pod ("pod/NAME").

With -f, policies are those of files. Alone, there is no mesh to ask: the receiver is
labelled app=ACCOUNT unless --to-labels says otherwise, and listens on port 8080 unless
--port does.

` + howTargeted + `

On a cluster, pods, services and policies are read with your own permissions: list on pods,
services, endpointslices and the three policy kinds in the receiver's namespace, list on
policies in the root namespace, and get on ConfigMap castellan-server for the mesh settings
(or --mesh). Every endpoint is judged; where they differ, each is shown, and all must allow.
If you may run programs in the server's pod, the answer also says where what is written is
not what is enforced: refused, or not acknowledged yet.`,
		Example: `  castellan authz can-i --from shop/frontend --to orders GET /
  castellan authz can-i --from none --to shop/payments POST /pay --jwt token -f policies/ --explain
  castellan authz can-i --from shop/frontend --to orders -n shop --port 80 --method POST --path /pay`,
		Args: cobra.MaximumNArgs(2),
	}
	f := cmd.Flags()
	f.StringVar(&q.from, "from", "", "caller (required)")
	f.StringVar(&q.to, "to", "", "receiver (required)")
	f.BoolVar(&q.tcp, "tcp", false, "a TCP connection instead of a request")
	f.StringVar(&q.method, "method", "", "method of the request (default GET)")
	f.StringVar(&q.target, "path", "", "path of the request (default /)")
	f.Uint16Var(&q.port, "port", 0, "port of the workload, or on a cluster of the service (default: the first that is declared)")
	f.StringVar(&q.host, "host", "", "Host header (default: the receiver's)")
	f.StringArrayVar(&q.headers, "header", nil, "request header, k=v (repeats)")
	f.StringVar(&q.jwtFile, "jwt", "", "file with an end-user token (- for standard input), sent as Authorization: Bearer")
	f.StringVar(&q.sourceIP, "source-ip", "127.0.0.1", "address the connection comes from")
	f.StringVar(&q.remoteIP, "remote-ip", "", "original client's address, as trusted proxies told it (default: what X-Forwarded-For says, if mesh settings trust it; else --source-ip)")
	f.StringVar(&q.sni, "sni", "", "server name of the TLS handshake")
	f.StringArrayVar(&q.toLabels, "to-labels", nil, "labels of the receiver, k=v[,k=v] (repeats)")
	f.StringVar(&q.meshFile, "mesh", "", "`FILE` with mesh settings: YAML, the keys of the server's mesh section at top level")
	f.StringArrayVarP(&q.files, "filename", "f", nil, "file or directory of policies, - for standard input (repeats)")
	f.BoolVar(&q.explain, "explain", false, "say how the decision came about, step by step")
	target := e.targetFlags(cmd)
	formats := []string{"table", "json", "yaml"}
	format := outputFlag(cmd, formats...)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := checkOutput(*format, formats...); err != nil {
			return err
		}
		q.sourceGiven = cmd.Flags().Changed("source-ip") || cmd.Flags().Changed("remote-ip")
		if err := q.request(args); err != nil {
			return err
		}
		stop := e.progress("deciding")
		answer, err := e.answer(cmd.Context(), q, target)
		stop()
		if err != nil {
			return err
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

// answer decides at every receiver, and puts the decisions together.
func (e *env) answer(ctx context.Context, q *canI, t *target) (*answer, error) {
	s, err := e.sceneOf(ctx, q, t)
	if err != nil {
		return nil, err
	}
	if s.caller, err = parseCaller(q.from, s.domain); err != nil {
		return nil, err
	}
	found, err := s.receivers(q)
	if err != nil {
		return nil, err
	}
	var answers []*answer
	for i := range found {
		a, err := e.decide(ctx, q, s, &found[i])
		if err != nil {
			return nil, err
		}
		if !q.explain {
			a.Steps = nil
		}
		answers = append(answers, a)
	}
	a := together(answers)
	if s.cluster && len(q.files) == 0 {
		a.Warnings = append(a.Warnings, q.unsaid(s)...)
	}
	for _, w := range a.Warnings {
		fmt.Fprintf(e.err, "castellan: %s\n", visible(w))
	}
	return a, nil
}

// sceneOf chooses what the decision is taken from.
func (e *env) sceneOf(ctx context.Context, q *canI, t *target) (*scene, error) {
	upGiven := t.cmd.Flags().Changed("up")
	if len(q.files) > 0 && !upGiven && !t.kube.given() {
		return e.localScene(q.files, q.meshFile, "")
	}
	cluster, err := t.onCluster()
	if err != nil {
		return nil, err
	}
	if !cluster {
		if _, err := t.upMesh(); err != nil {
			if !upGiven {
				return nil, invalidf("%w; or give policies with -f", err)
			}
			return nil, err
		}
		return e.localScene(q.files, q.meshFile, *t.up)
	}
	namespace, err := t.kube.namespace()
	if err != nil {
		return nil, err
	}
	// What names its namespace itself is in that.
	if ns, name, ok := strings.Cut(q.to, "/"); ok && name != "" {
		if _, pod := parsePodRef(q.to); !pod {
			if given := *t.kube.flags.Namespace; given != "" && given != ns {
				return nil, invalidf("--to %q is not in namespace %q, which -n names", q.to, given)
			}
			namespace = ns
		}
	}
	// And so does a host name: SERVICE.NAMESPACE, whatever follows.
	if labels := strings.Split(q.to, "."); len(labels) > 1 && !strings.Contains(q.to, "/") && *t.kube.flags.Namespace == "" {
		namespace = labels[1]
	}
	return e.clusterScene(ctx, t.kube, namespace, q.files, q.meshFile)
}

// unsaid are warnings about what the decision hangs on and was not given.
func (q *canI) unsaid(s *scene) []string {
	if q.sourceGiven {
		return nil
	}
	for _, d := range s.docs {
		if asks(d, "source.ip") || asks(d, "remote.ip") || namesAddresses(d) {
			return []string{fmt.Sprintf("%s %s/%s is about the caller's address, taken to be %s; give --source-ip", d.Kind, d.Metadata.Namespace, d.Metadata.Name, q.sourceIP)}
		}
	}
	return nil
}

// namesAddresses reports whether a rule is about addresses of callers.
func namesAddresses(d policy.Document) bool {
	return d.Authorization != nil && slices.ContainsFunc(d.Authorization.Rules, func(r policy.Rule) bool {
		return slices.ContainsFunc(r.From, func(f policy.From) bool {
			return f.Source != nil && len(f.Source.IPBlocks)+len(f.Source.NotIPBlocks)+len(f.Source.RemoteIPBlocks)+len(f.Source.NotRemoteIPBlocks) > 0
		})
	})
}

// request reads what was asked, as far as it needs no policy.
func (q *canI) request(args []string) error {
	switch {
	case q.from == "" || q.to == "":
		return invalidf("--from and --to are required, as in --from shop/frontend --to shop/orders")
	case q.tcp && len(args) > 0:
		return invalidf("--tcp takes no method and path")
	case len(args) > 0 && (q.method != "" || q.target != ""):
		return invalidf("give METHOD and /path, or --method and --path, not both")
	case len(args) == 1:
		return invalidf("give METHOD and /path, as in GET /, or --tcp")
	case q.tcp && (q.method != "" || q.target != ""):
		return invalidf("--tcp takes no method and path")
	case q.tcp && (q.jwtFile != "" || len(q.headers) > 0 || q.host != ""):
		return invalidf("--tcp has no token, headers or host")
	}
	if !q.tcp {
		q.any = len(args) == 0 && q.method == "" && q.target == "" && q.jwtFile == "" && len(q.headers) == 0 && q.host == ""
		if len(args) == 2 {
			q.method, q.target = args[0], args[1]
		}
		q.method, q.target = cmp.Or(q.method, http.MethodGet), cmp.Or(q.target, "/")
		if !strings.HasPrefix(q.target, "/") && q.target != "*" && !strings.Contains(q.target, "://") {
			return invalidf("%q is no path; it begins with a slash", q.target)
		}
	}
	for _, a := range []struct {
		flag, text string
		to         *netip.Addr
	}{{"--source-ip", q.sourceIP, &q.source}, {"--remote-ip", q.remoteIP, &q.remote}} {
		var err error
		if *a.to, err = parseIP(a.flag, a.text); err != nil {
			return err
		}
	}
	return nil
}

// parsePairs reads k=v arguments.
func parsePairs(flag string, args []string) ([][2]string, error) {
	var out [][2]string
	for _, a := range args {
		k, v, ok := strings.Cut(a, "=")
		if !ok || k == "" {
			return nil, invalidf("%s %q: want k=v", flag, a)
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
func (e *env) readToken(path string) (string, error) {
	var data []byte
	var err error
	if path == "-" {
		data, err = readBounded(e.in, "standard input")
	} else {
		data, err = readNamedFile("--jwt", path)
	}
	if err != nil {
		return "", err
	}
	token := strings.TrimSpace(string(data))
	if token == "" {
		return "", invalidf("--jwt %s is empty", path)
	}
	return token, nil
}
