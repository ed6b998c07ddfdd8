// Package archtest holds the table of who may import whom (ARCHITECTURE.md), and
// what each binary may link. Every ban carries its reason.
package archtest_test

import (
	"bufio"
	"bytes"
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "castellan.dev/"

// leaves are internal packages that anyone below cmd may use: they know no other room.
var leaves = []string{"internal/config", "internal/disk", "internal/run", "internal/telemetry", "internal/jws", "internal/tlsconf", "internal/workloads", "internal/xds", "internal/judge", "internal/harden", "internal/crowd"}

// allowed is the table: a package, and all below it unless they have a line of
// their own, may import only these of our packages.
var allowed = map[string][]string{
	"identity":           {},
	"api":                {},
	"authz":              {"identity", "api/policy"},
	"ca":                 append([]string{"identity", "ca"}, leaves...),
	"ca/server":          append([]string{"identity", "ca", "api"}, leaves...),
	"discovery":          append([]string{"identity", "api", "authz"}, leaves...),
	"agent":              append([]string{"identity", "api", "sds", "authz", "discovery", "agent"}, leaves...),
	"sds":                {"identity", "internal/xds"},
	"proxy":              append([]string{"identity", "authz", "api", "proxy"}, leaves...),
	"proxy/engine":       {},
	"proxy/capture":      {"internal/config", "proxy/original"},
	"proxy/original":     {},
	"internal/config":    {"identity", "api/policy"},
	"internal/disk":      {},
	"internal/telemetry": {"internal/config", "internal/crowd"},
	"internal/run":       {},
	"internal/harden":    {},
	"internal/crowd":     {},
	"internal/jws":       {"identity", "api/policy"},
	"internal/tlsconf":   {"identity"},
	"internal/workloads": {"identity", "internal/config"},
	"internal/xds":       {},
	"internal/judge":     {"authz", "api/policy", "internal/jws"},
	"webhook":            {"identity", "authz", "api", "internal/config", "internal/run", "internal/telemetry", "internal/workloads"},
	"internal/kube":      append([]string{"identity", "api"}, leaves...),
	"internal/install":   {"deploy", "webhook", "internal/config"},
}

// kubeUsers are the only ones who may import internal/kube: everybody else gets
// plain values of it, so that no other room depends on Kubernetes.
var kubeUsers = []string{"cmd", "internal/cli", "internal/kube"}

// free may import anything: they wire.
var free = []string{"cmd", "internal/cli", "internal/up", "internal/archtest", "deploy"}

func within(path, folder string) bool { return path == folder || strings.HasPrefix(path, folder+"/") }

// rule finds the line of the table that holds for a package: the longest.
func rule(pkg string) (string, bool) {
	best, found := "", false
	for folder := range allowed {
		if within(pkg, folder) && len(folder) >= len(best) {
			best, found = folder, true
		}
	}
	return best, found
}

func goList(t *testing.T, args ...string) []string {
	t.Helper()
	cmd := exec.Command("go", append([]string{"list"}, args...)...)
	cmd.Dir = "../.."
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list %v: %v\n%s", args, err, stderr.Bytes())
	}
	return strings.Split(strings.TrimSpace(string(out)), "\n")
}

func TestImportTable(t *testing.T) {
	for _, line := range goList(t, "-f", `{{.ImportPath}} {{join .Imports " "}}`, "./...") {
		fields := strings.Fields(line)
		pkg := strings.TrimPrefix(fields[0], module)
		if slices.ContainsFunc(free, func(f string) bool { return within(pkg, f) }) {
			continue
		}
		folder, ok := rule(pkg)
		if !ok {
			t.Errorf("%s has no line in the import table", pkg)
			continue
		}
		for _, imported := range fields[1:] {
			own, ours := strings.CutPrefix(imported, module)
			if !ours || within(own, folder) {
				continue
			}
			if !slices.ContainsFunc(allowed[folder], func(a string) bool { return within(own, a) }) {
				t.Errorf("%s imports %s; the table allows %v", pkg, own, allowed[folder])
			}
		}
	}
}

// TestKubernetesStaysInItsRoom: the client is behind internal/kube, and internal/kube
// is met by those who wire only.
func TestKubernetesStaysInItsRoom(t *testing.T) {
	for _, line := range goList(t, "-f", `{{.ImportPath}} {{join .Imports " "}}`, "./...") {
		fields := strings.Fields(line)
		pkg := strings.TrimPrefix(fields[0], module)
		for _, imported := range fields[1:] {
			if within(imported, module+"internal/kube") && !slices.ContainsFunc(kubeUsers, func(f string) bool { return within(pkg, f) }) {
				t.Errorf("%s imports %s; only %v may", pkg, imported, kubeUsers)
			}
			// The command's own flags are kubectl's, which are of cli-runtime; what it
			// installs it applies as what it is, objects.
			if within(imported, "k8s.io/client-go") && !within(pkg, "internal/kube") && !within(pkg, "internal/cli") && !within(pkg, "internal/install") {
				t.Errorf("%s imports %s; the client is in internal/kube only", pkg, imported)
			}
		}
	}
}

// binaryBans say what a binary must not link.
var binaryBans = map[string][]struct{ path, reason string }{
	"castellan-proxy": {
		{"k8s.io/", "the sidecar has no Kubernetes client"},
		{"github.com/hashicorp/vault", "the sidecar never talks to Vault"},
		{"modernc.org/sqlite", "the sidecar has no database"},
		{"github.com/jackc/pgx", "the sidecar has no database"},
		{"github.com/casbin/", "the sidecar runs the index; casbin is the reference in tests"},
		{"helm.sh/", "only the operator's command installs"},
		{module + "ca", "the sidecar issues nothing"},
		{module + "discovery", "the sidecar reads no policy file"},
		{module + "agent", "the sidecar holds one identity, not many"},
		{"net/http/pprof", "no profiles on the admin port"},
		{"github.com/fsnotify/", "the sidecar watches no files"},
	},
	"castellan-agent": {
		{"k8s.io/client-go", "the agent has no Kubernetes permission, so no client"},
		{"helm.sh/", "only the operator's command installs"},
		{module + "ca", "the agent must not be able to sign"},
		{"modernc.org/sqlite", "the agent has no database"},
		{"github.com/casbin/", "the agent runs the index; casbin is the reference in tests"},
		{"net/http/pprof", "no profiles on the admin port"},
	},
	"castellan-server": {
		{module + "agent", "the server holds no workload keys"},
		{module + "proxy", "the server proxies nothing"},
		{"github.com/hashicorp/vault/sdk", "only Vault's api module is linked"},
		{"helm.sh/", "only the operator's command installs"},
		{"k8s.io/cli-runtime", "only the operator's command has kubectl's flags"},
		{"github.com/casbin/", "the server validates with the engine; casbin is the reference in tests"},
		{"net/http/pprof", "no profiles on the admin port"},
	},
}

func TestBinaries(t *testing.T) {
	for binary, bans := range binaryBans {
		deps := goList(t, "-deps", "./cmd/"+binary)
		for _, ban := range bans {
			for _, dep := range deps {
				if dep == strings.TrimSuffix(ban.path, "/") || strings.HasPrefix(dep, strings.TrimSuffix(ban.path, "/")+"/") {
					t.Errorf("%s links %s: %s", binary, dep, ban.reason)
				}
			}
		}
	}
}

// TestPackageDocs: every package says what it does, refuses and assumes. Generated
// code is exempt.
func TestPackageDocs(t *testing.T) {
	for _, line := range goList(t, "-f", `{{.ImportPath}} {{.Dir}}`, "./...") {
		pkg, dir, _ := strings.Cut(line, " ")
		if strings.HasSuffix(pkg, "/api/castellan/v1") {
			continue
		}
		documented := false
		files, err := filepath.Glob(filepath.Join(dir, "*.go"))
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			parsed, err := parser.ParseFile(token.NewFileSet(), f, nil, parser.PackageClauseOnly|parser.ParseComments)
			if err != nil {
				t.Fatal(err)
			}
			documented = documented || parsed.Doc != nil
		}
		if !documented {
			t.Errorf("%s has no package comment", pkg)
		}
	}
}

// TestNoInit: nothing happens before main; state and flags are passed, not global.
func TestNoInit(t *testing.T) {
	err := filepath.WalkDir("../..", func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, ".pb.go") {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		lines := bufio.NewScanner(f)
		lines.Buffer(nil, 1<<20)
		for lines.Scan() {
			if strings.HasPrefix(lines.Text(), "func init()") {
				t.Errorf("%s has an init function", path)
			}
		}
		return lines.Err()
	})
	if err != nil {
		t.Fatal(err)
	}
}
