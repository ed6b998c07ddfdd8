package cli

import (
	"net/netip"
	"strings"

	"github.com/spf13/cobra"
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
	upPath             string
	upGiven            bool
	explain            bool

	// What request made of the above.
	source, remote netip.Addr
}

func (e *env) canICommand() *cobra.Command {
	q := &canI{}
	cmd := &cobra.Command{
		Use:   "can-i --from WHO --to WHOM (METHOD /path | --tcp) (-f FILE_OR_DIR… | --up UP.JSON)",
		Short: "Decide one request as the proxy would, and say why",
		Long: `Take the whole decision of the receiving proxy: mutual TLS mode, normalisation of the
path, end-user tokens, policy. Exit code 0 allowed, 2 denied, 3 when what was asked or a
policy is invalid. Providers of CUSTOM policies are not asked: that is a denial.

--from is NAMESPACE/ACCOUNT, a SPIFFE ID, or "none" for a caller without a certificate.
--to is NAMESPACE/ACCOUNT, or with a running mesh also a service ("orders", "shop/orders").
Without a running mesh the receiver is labelled app=ACCOUNT unless --to-labels says
otherwise, and listens on port 8080 unless --port does.`,
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
	f.StringVar(&q.jwtFile, "jwt", "", "file with an end-user token (- for standard input), sent as Authorization: Bearer")
	f.StringVar(&q.sourceIP, "source-ip", "127.0.0.1", "address the connection comes from")
	f.StringVar(&q.remoteIP, "remote-ip", "", "original client's address, as trusted proxies told it (default: what X-Forwarded-For says, if mesh settings trust it; else --source-ip)")
	f.StringVar(&q.sni, "sni", "", "server name of the TLS handshake")
	f.StringArrayVar(&q.toLabels, "to-labels", nil, "labels of the receiver, k=v[,k=v] (repeats)")
	f.StringVar(&q.meshFile, "mesh", "", "`FILE` with mesh settings: YAML, the keys of the server's mesh section at top level")
	f.StringArrayVarP(&q.files, "filename", "f", nil, "file or directory of policies, - for standard input (repeats)")
	f.BoolVar(&q.explain, "explain", false, "say how the decision came about, step by step")
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
		stop := e.progress("deciding")
		answer, err := e.decide(cmd.Context(), q, setting)
		stop()
		if err != nil {
			return err
		}
		if !q.explain {
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

// request reads what was asked, as far as it needs no policy.
func (q *canI) request(args []string) error {
	switch {
	case q.from == "" || q.to == "":
		return invalidf("--from and --to are required, as in --from shop/frontend --to shop/orders")
	case q.tcp && len(args) > 0:
		return invalidf("--tcp takes no method and path")
	case !q.tcp && len(args) != 2:
		return invalidf("give METHOD and /path, as in GET /, or --tcp")
	case q.tcp && (q.jwtFile != "" || len(q.headers) > 0 || q.host != ""):
		return invalidf("--tcp has no token, headers or host")
	}
	if !q.tcp {
		q.method, q.target = args[0], args[1]
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
