package kubernetes_test

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// tail is the last lines of a text.
func tail(text string, lines int) string {
	all := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// dump writes what explains a failure of the whole: our pods, and what the cluster's
// programs said.
func dump(w io.Writer) {
	say := func(lines int, args ...string) {
		r, err := kubectl("", args...)
		if err != nil {
			r.out += err.Error()
		}
		fmt.Fprintf(w, "== kubectl %s\n%s\n", strings.Join(args, " "), tail(r.out, lines))
	}
	say(60, "get", "pods", "-A", "-o", "wide")
	say(60, "describe", "pods", "-n", "castellan-system")
	say(30, "get", "events", "-A", "--sort-by=.lastTimestamp")
	say(60, "logs", "-n", "castellan-system", "deployment/castellan-server", "--tail=60")
	say(60, "logs", "-n", "castellan-system", "-l", "app=castellan-agent", "--tail=12", "--prefix")
	files, _ := filepath.Glob(filepath.Join(shared.Logs(), "*-kubelet.log")) // of the kubelets
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		fmt.Fprintf(w, "== %s\n%s\n", filepath.Base(f), tail(string(data), 10))
	}
}

// dumpNamespace logs what explains a failure of one test.
func dumpNamespace(t testing.TB, ns string) {
	t.Helper()
	for _, args := range [][]string{
		{"get", "pods", "-n", ns, "-o", "wide"},
		{"get", "events", "-n", ns},
	} {
		r, _ := kubectl("", args...)
		t.Logf("== kubectl %s\n%s", strings.Join(args, " "), tail(r.out, 25))
	}
	var list struct{ Items []podStatus }
	if err := api.get("/api/v1/namespaces/"+ns+"/pods", &list); err != nil {
		t.Log(err)
		return
	}
	for _, p := range list.Items {
		r, _ := kubectl("", "logs", "-n", ns, p.Metadata.Name, "--all-containers", "--prefix", "--tail=15")
		t.Logf("== logs of %s\n%s", p.Metadata.Name, tail(r.out+r.err, 40))
	}
}
