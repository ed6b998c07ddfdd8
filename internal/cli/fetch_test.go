package cli_test

import (
	"bytes"
	"crypto/tls"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"castellan.dev/internal/tlsconf/tlsconftest"
)

func TestFetch(t *testing.T) {
	root := tlsconftest.NewRoot(t, inDomain("cluster.local"))
	issuer := root.SVIDIssuer(t)
	svid := issuer.Leaf(t, ordersID)
	api := newWorkloadAPI(t)
	api.give(t, root, svid, issuer.Leaf(t, frontendID))

	t.Run("prints the SVID", func(t *testing.T) {
		for _, socket := range []string{api.socket, "unix:" + api.socket, "unix://" + api.socket} {
			r := castellanRun(t, "cert", "fetch", "--socket", socket).want(t, 0)
			if !strings.HasPrefix(r.out, ordersID+"\n") || strings.Contains(r.out, frontendID) {
				t.Errorf("%s", r.out)
			}
		}
		var got []view
		castellanRun(t, "cert", "fetch", "--socket", api.socket, "-o", "json").want(t, 0).decode(t, &got)
		if len(got) != 2 || got[0].SPIFFEID != ordersID {
			t.Errorf("%+v", got)
		}
		r := castellanRun(t, "cert", "fetch", "--socket", api.socket, "-o", "pem").want(t, 0)
		if r.out != string(pemOf(tlsconftest.Chain(t, svid)...)) {
			t.Errorf("%s", r.out)
		}
	})
	t.Run("the socket of the environment", func(t *testing.T) {
		t.Setenv("SPIFFE_ENDPOINT_SOCKET", "unix://"+api.socket)
		castellanRun(t, "cert", "fetch").want(t, 0, ordersID)
	})
	t.Run("inspect and verify read the same socket", func(t *testing.T) {
		r := castellanRun(t, "cert", "inspect", "unix:"+api.socket).want(t, 0, ordersID, frontendID)
		if !strings.HasPrefix(r.out, ordersID+"\n") {
			t.Errorf("%s", r.out)
		}
		castellanRun(t, "cert", "inspect", "unix:"+api.socket, "--expires-within", "2h").want(t, 2, "renew it")
		castellanRun(t, "cert", "verify", "--bundle", writeFile(t, "b.pem", pemOf(root.Cert)), "unix:"+api.socket).want(t, 0, ordersID)
	})
	t.Run("writes what servers load", func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "new", "dir")
		// What stands there is replaced, mode and all; links are not followed.
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		outside := writeFile(t, "outside", []byte("mine"))
		if err := os.Symlink(outside, filepath.Join(dir, "svid_key.pem")); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "svid.pem"), bytes.Repeat([]byte("x"), 1<<16), 0o666); err != nil {
			t.Fatal(err)
		}
		r := castellanRun(t, "cert", "fetch", "--socket", api.socket, "--write", dir).want(t, 0)
		if r.out != "" || !strings.Contains(r.err, "svid.pem, svid_key.pem, bundle.pem for "+ordersID+", valid until ") {
			t.Errorf("stdout %q, stderr %q", r.out, r.err)
		}
		pair, err := tls.LoadX509KeyPair(filepath.Join(dir, "svid.pem"), filepath.Join(dir, "svid_key.pem"))
		if err != nil || len(pair.Certificate) != 2 || !bytes.Equal(pair.Certificate[0], svid.Certificate[0]) {
			t.Fatalf("%v, %d certificates", err, len(pair.Certificate))
		}
		if got, err := os.ReadFile(filepath.Join(dir, "bundle.pem")); err != nil || !bytes.Equal(got, pemOf(root.Cert)) {
			t.Errorf("bundle %v\n%s", err, got)
		}
		for name, mode := range map[string]os.FileMode{"svid_key.pem": 0o600, "svid.pem": 0o644, "bundle.pem": 0o644} {
			if st, err := os.Lstat(filepath.Join(dir, name)); err != nil || st.Mode() != mode {
				t.Errorf("%s: %v %v, want %v", name, st.Mode(), err, mode)
			}
		}
		if got, err := os.ReadFile(outside); err != nil || string(got) != "mine" {
			t.Errorf("the link's target was written to: %q", got)
		}
		if left, err := filepath.Glob(filepath.Join(dir, ".*")); err != nil || len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
	})
	t.Run("the directory cannot be written", func(t *testing.T) {
		file := writeFile(t, "file", nil)
		castellanRun(t, "cert", "fetch", "--socket", api.socket, "--write", file).want(t, 1, "castellan: ")
	})
}

func TestFetchRefused(t *testing.T) {
	api := newWorkloadAPI(t)
	castellanRun(t, "cert", "fetch", "--socket", api.socket).want(t, 1, "no identity issued", "the agent holds no identity for this workload; read the agent's log")
	for code, hint := range map[codes.Code]string{
		codes.Unavailable:      "does the agent run, and is this user among the socket's uids?",
		codes.Unimplemented:    "what listens there is no SPIFFE Workload API",
		codes.DeadlineExceeded: "the agent has no certificate yet",
	} {
		api.mu.Lock()
		api.refusal = status.Error(code, "why")
		api.mu.Unlock()
		castellanRun(t, "cert", "fetch", "--socket", api.socket).want(t, 1, "why", hint)
	}
	castellanRun(t, "cert", "fetch", "--socket", api.socket, "--watch").want(t, 1, "no SVID from unix://"+api.socket)
	castellanRun(t, "cert", "fetch", "--socket", filepath.Join(t.TempDir(), "none")).want(t, 1, "there is no socket", "does the agent run, and serve this workload?")
	t.Setenv("SPIFFE_ENDPOINT_SOCKET", "")
	castellanRun(t, "cert", "fetch").want(t, 3, "no socket given; use --socket or set SPIFFE_ENDPOINT_SOCKET")
	castellanRun(t, "cert", "fetch", "--socket", "tcp:nonsense").want(t, 3, `--socket "tcp:nonsense"`)
	castellanRun(t, "cert", "fetch", "--socket", t.TempDir()).want(t, 3, "is no socket")
	castellanRun(t, "cert", "fetch", "svid.pem").want(t, 3, `"svid.pem": want pod/NAME or deploy/NAME`)
	castellanRun(t, "cert", "fetch", "-o", "x").want(t, 3, `-o "x"`)
}
