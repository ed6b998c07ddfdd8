package up

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"text/tabwriter"
)

// File is up.json: where everything of a running mesh is. Paths are absolute,
// addresses are host:port.
type File struct {
	TrustDomain string `json:"trustDomain"`
	// Bundle is a PEM file with the roots only.
	Bundle    string              `json:"bundle"`
	PolicyDir string              `json:"policyDir"`
	Server    Server              `json:"server"`
	Agent     Agent               `json:"agent"`
	Workloads map[string]Workload `json:"workloads"`
	JWT       JWT                 `json:"jwt"`
}

// Server is where the server is; HTTP serves /livez, /readyz and /metrics.
type Server struct {
	GRPC string `json:"grpc"`
	HTTP string `json:"http"`
	// Admin is the operator's Unix socket.
	Admin string `json:"admin"`
	PID   int    `json:"pid"`
}

// Agent is where the agent is, and the file with its own token.
type Agent struct {
	Admin string `json:"admin"`
	PID   int    `json:"pid"`
	Token string `json:"token"`
}

// Workload is one workload of the sample mesh; PID is its proxy's.
type Workload struct {
	Socket   string            `json:"socket"`
	Token    string            `json:"token"`
	Inbound  string            `json:"inbound"`
	App      string            `json:"app"`
	Admin    string            `json:"admin"`
	PID      int               `json:"pid"`
	Outbound map[string]string `json:"outbound"`
}

// JWT is the sample issuer of end-user tokens; all but Issuer are files.
type JWT struct {
	Issuer       string `json:"issuer"`
	JWKS         string `json:"jwks"`
	ValidToken   string `json:"validToken"`
	NoGroupToken string `json:"noGroupToken"`
	ExpiredToken string `json:"expiredToken"`
}

// ReadFile reads an up.json. An absent one says how to get one.
func ReadFile(path string) (*File, error) {
	data, err := os.ReadFile(path)
	if os.IsNotExist(err) {
		return nil, fmt.Errorf("no mesh is running by %s; start one with `castellan up`, or name its file with --up", path)
	}
	if err != nil {
		return nil, err
	}
	var f File
	if err := json.Unmarshal(data, &f); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return &f, nil
}

// Dir returns the data directory of a mesh by the path of its up.json.
func Dir(path string) string { return filepath.Dir(path) }

// WorkloadsFile returns where the mesh by this up.json declares pods and services.
func WorkloadsFile(path string) string { return filepath.Join(Dir(path), "workloads.yaml") }

func (f File) write(path string) error {
	out, err := json.MarshalIndent(f, "", "  ")
	if err != nil {
		return fmt.Errorf("up: %w", err)
	}
	return writeFile(path, append(out, '\n'), 0o644)
}

func (m *mesh) file(pids map[string]int) File {
	f := File{
		TrustDomain: m.trustDomain.Name(),
		Bundle:      m.layout.path("bundle.pem"),
		PolicyDir:   m.policyDir,
		Server:      Server{GRPC: m.state.addr("server/grpc"), HTTP: m.state.addr("server/http"), Admin: m.layout.path("server", "admin.sock"), PID: pids["server"]},
		Agent:       Agent{Admin: m.state.addr("agent/admin"), PID: pids["agent"], Token: m.token("agent")},
		Workloads:   map[string]Workload{},
		JWT: JWT{
			Issuer: userIssuerName, JWKS: m.layout.path("issuer", "users.jwks"),
			ValidToken: m.token("user-valid"), NoGroupToken: m.token("user-no-group"), ExpiredToken: m.token("user-expired"),
		},
	}
	for _, w := range sampleWorkloads {
		out := map[string]string{}
		for _, to := range sampleWorkloads {
			if to.service {
				out[to.account] = "http://" + m.state.addr(w.key()+"/outbound/"+to.account)
			}
		}
		f.Workloads[w.key()] = Workload{
			Socket: m.socket(w), Token: m.token(w.file()),
			Inbound: m.state.addr(w.key() + "/inbound"), App: m.state.addr(w.key() + "/app"), Admin: m.state.addr(w.key() + "/admin"),
			PID: pids[w.key()+"/proxy"], Outbound: out,
		}
	}
	return f
}

// Describe prints the endpoints of a running mesh and five commands to try, each
// with what it answers. command is how the user calls castellan.
func (f File) Describe(w io.Writer, command, upFile string) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintf(t, "TRUST DOMAIN\t%s\n", f.TrustDomain)
	fmt.Fprintf(t, "SERVER\tgrpc %s\thttp http://%s\tpid %d\n", f.Server.GRPC, f.Server.HTTP, f.Server.PID)
	fmt.Fprintf(t, "AGENT\tadmin http://%s\t\tpid %d\n", f.Agent.Admin, f.Agent.PID)
	for _, s := range sampleWorkloads {
		wl := f.Workloads[s.key()]
		fmt.Fprintf(t, "%s\tinbound %s (mTLS)\tadmin http://%s\tpid %d\n", s.key(), wl.Inbound, wl.Admin, wl.PID)
	}
	fmt.Fprintf(t, "POLICIES\t%s\n", f.PolicyDir)
	fmt.Fprintf(t, "ROOTS\t%s\n", f.Bundle)
	if err := t.Flush(); err != nil {
		return err
	}
	front, guest := f.Workloads["shop/frontend"], f.Workloads["guest/intruder"]
	flag := ""
	if upFile != "" && filepath.Clean(upFile) != defaultUpFile() {
		flag = " --up " + upFile
	}
	try := []struct{ command, answer string }{
		{"curl -i " + front.Outbound["orders"] + "/", "200: the frontend may GET orders"},
		{"curl -i " + guest.Outbound["orders"] + "/", "403: guests may call nothing"},
		{"curl -i -X POST " + front.Outbound["payments"] + "/", "403: a payment needs an end user"},
		{`curl -i -X POST -H "Authorization: Bearer $(cat ` + f.JWT.ValidToken + `)" ` + front.Outbound["payments"] + "/", "200: the user is in the group finance"},
		{command + " authz can-i" + flag + " --from guest/intruder --to orders GET / --explain", "denied, and by which rule"},
	}
	fmt.Fprintf(w, "\nTry:\n")
	for _, c := range try {
		fmt.Fprintf(w, "  %s\n      # %s\n", c.command, c.answer)
	}
	_, err := fmt.Fprintln(w, "\nCtrl-C ends it; the next start on the same directory has the same root and ports.")
	return err
}

// DefaultDataDir is where a mesh runs when nothing else is said.
const DefaultDataDir = ".castellan"

func defaultUpFile() string {
	abs, err := filepath.Abs(filepath.Join(DefaultDataDir, "up.json"))
	if err != nil {
		return ""
	}
	return abs
}
