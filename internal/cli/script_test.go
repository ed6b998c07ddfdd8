package cli_test

import (
	"crypto/tls"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"castellan.dev/internal/tlsconf/tlsconftest"
)

// TestScripts runs the command as people do, in processes of their own. Scripts
// find a chain in svid.pem and svid_key.pem, its root in root.pem, a Workload API
// at $SOCKET, a TLS server at $SERVER and the sample policies in $POLICIES.
func TestScripts(t *testing.T) {
	samples, err := filepath.Abs("../../deploy/samples/quickstart")
	if err != nil {
		t.Fatal(err)
	}
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(env *testscript.Env) error {
			root := tlsconftest.NewRoot(t, inDomain("cluster.local"))
			issuer := root.SVIDIssuer(t)
			svid := issuer.Leaf(t, ordersID, tenHours)
			api := newWorkloadAPI(t)
			api.give(t, root, svid)
			env.Values["rotate"] = func() { api.give(t, root, issuer.Leaf(t, ordersID, tenHours)) }
			env.Setenv("SOCKET", api.socket)
			env.Setenv("SERVER", tlsServer(t, "tcp4", &tls.Config{Certificates: []tls.Certificate{*svid}}))
			env.Setenv("POLICIES", samples)
			env.Setenv("NO_COLOR", "")
			for name, data := range map[string][]byte{
				"svid.pem": pemOf(tlsconftest.Chain(t, svid)...), "svid_key.pem": keyPEM(t, svid), "root.pem": pemOf(root.Cert),
			} {
				if err := os.WriteFile(filepath.Join(env.WorkDir, name), data, 0o600); err != nil {
					return err
				}
			}
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"code": codeCommand, "await": awaitCommand,
			"rotate": func(ts *testscript.TestScript, _ bool, _ []string) {
				rotate, _ := ts.Value("rotate").(func())
				rotate()
			},
		},
	})
}

// codeCommand is "code N COMMAND…": it must end with exit code N.
func codeCommand(ts *testscript.TestScript, _ bool, args []string) {
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	got := 0
	var exit *exec.ExitError
	if err := ts.Exec(args[1], args[2:]...); errors.As(err, &exit) {
		got = exit.ExitCode()
	} else {
		ts.Check(err)
	}
	if got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
}

// awaitCommand is "await FILE [OTHER]": until FILE is there and, if given, differs
// from OTHER.
func awaitCommand(ts *testscript.TestScript, _ bool, args []string) {
	read := func(name string) (string, error) {
		data, err := os.ReadFile(ts.MkAbs(name))
		return string(data), err
	}
	deadline := time.Now().Add(30 * time.Second)
	for {
		got, err := read(args[0])
		if err == nil && len(args) == 1 {
			return
		}
		if err == nil {
			other, err := read(args[1])
			ts.Check(err)
			if got != other {
				return
			}
		}
		if time.Now().After(deadline) {
			ts.Fatalf("%s", fmt.Sprint("waited in vain for ", strings.Join(args, " to differ from ")))
		}
		time.Sleep(10 * time.Millisecond)
	}
}
