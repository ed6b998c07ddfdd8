package cli

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	castellanv1 "castellan.dev/api/castellan/v1"
	"castellan.dev/internal/install"
	"castellan.dev/internal/up"
)

// Outcomes of one check.
const (
	checkOK   = install.OK
	checkWarn = install.Warning
	checkFail = install.Failed
)

type checkResult = install.Result

// checker goes through a running mesh part by part.
type checker struct {
	ctx     context.Context
	upPath  string
	file    *up.File
	roots   []*x509.Certificate
	client  *http.Client
	results []checkResult
}

func (e *env) checkCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "check", Short: "Check every part of a running mesh, or a cluster before it has one", Args: noArgs,
		Long: `Check every part of a running mesh: its processes or pods, certificates, sockets and
policies. With --pre, check whether a cluster can take Castellan. Exit code 2 when
something fails; each failure comes with a hint.

` + howTargeted,
	}
	t := e.targetFlags(cmd)
	pre := addPreFlags(cmd)
	timeout := cmd.Flags().Duration("timeout", time.Minute, "how long all of it may take")
	formats := []string{"table", "json", "yaml"}
	format := outputFlag(cmd, formats...)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := checkOutput(*format, formats...); err != nil {
			return err
		}
		if *timeout <= 0 {
			return invalidf("--timeout: %v is no time", *timeout)
		}
		stop := e.progress("checking")
		ctx, cancel := context.WithTimeout(cmd.Context(), *timeout)
		defer cancel()
		results, err := e.check(ctx, t, pre)
		stop()
		if err != nil {
			return err
		}
		return e.report(results, *format)
	}
	return cmd
}

// check goes through the mesh that is meant.
func (e *env) check(ctx context.Context, t *target, pre *preFlags) ([]checkResult, error) {
	if err := pre.check(); err != nil {
		return nil, err
	}
	if pre.asked {
		return e.checkBefore(ctx, t, pre)
	}
	cluster, err := t.onCluster()
	if err != nil {
		return nil, err
	}
	if cluster {
		return e.checkCluster(ctx, t)
	}
	file, err := t.upMesh()
	if err != nil {
		return nil, err
	}
	c := &checker{ctx: ctx, upPath: *t.up, file: file, client: &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{Proxy: nil, DisableKeepAlives: true}}}
	c.run()
	return c.results, nil
}

func (e *env) printChecks(results []checkResult) error {
	mark := map[string]string{checkOK: "√", checkWarn: "!", checkFail: "×"}
	colored := color(e.out)
	for _, r := range results {
		line := mark[r.Status] + " " + visible(r.Check)
		if r.Message != "" {
			line += ": " + visible(r.Message)
		}
		if r.Status == checkFail {
			line = alarm(line, colored)
		}
		if _, err := fmt.Fprintln(e.out, line); err != nil {
			return err
		}
		if r.Hint != "" {
			if _, err := fmt.Fprintf(e.out, "    hint: %s\n", visible(r.Hint)); err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *checker) add(name, status, message, hint string) {
	c.results = append(c.results, checkResult{Check: name, Status: status, Message: message, Hint: hint})
}

// verdict records a failure with its hint, or a success.
func (c *checker) verdict(name string, err error, okMessage, hint string) bool {
	if err != nil {
		c.add(name, checkFail, err.Error(), hint)
		return false
	}
	c.add(name, checkOK, okMessage, "")
	return true
}

func (c *checker) run() {
	c.bundle()
	c.process("server", c.file.Server.PID)
	c.ready("server", c.file.Server.HTTP)
	c.serving()
	c.authorities()
	c.process("agent", c.file.Agent.PID)
	c.ready("agent", c.file.Agent.Admin)
	for _, name := range slices.Sorted(maps.Keys(c.file.Workloads)) {
		c.workload(name, c.file.Workloads[name])
	}
	c.policies()
}

func (c *checker) bundle() {
	roots, _, err := loadBundle(c.file.Bundle)
	if err == nil {
		for _, r := range roots {
			if failed := (svidCheck{now: time.Now()}).times(r, "the root "+nameOf(r)); failed != nil { //nolint:forbidigo // a command line reads the real clock
				err = fmt.Errorf("%s", failed.Reason)
			}
		}
	}
	c.roots = roots
	c.verdict("bundle", err, count(len(roots), "root"), "the server writes it at start; see the server's log")
}

func (c *checker) process(name string, pid int) {
	err := syscall.Kill(pid, 0)
	if pid <= 0 {
		err = syscall.ESRCH
	}
	if err != nil {
		err = fmt.Errorf("process %d is gone (%w)", pid, err)
	}
	c.verdict(name+" process", err, fmt.Sprintf("pid %d", pid), "castellan up restarts its parts; where none comes back, read "+up.Dir(c.upPath)+"/logs")
}

func (c *checker) ready(name, addr string) {
	req, err := http.NewRequestWithContext(c.ctx, http.MethodGet, "http://"+addr+"/readyz?verbose", nil)
	if err != nil {
		c.add(name+" ready", checkFail, err.Error(), "up.json is damaged; start the mesh again")
		return
	}
	resp, err := c.client.Do(req)
	if err != nil {
		c.add(name+" ready", checkFail, err.Error(), "nothing listens there; read "+up.Dir(c.upPath)+"/logs")
		return
	}
	defer resp.Body.Close()
	body, _ := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	if resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s", strings.Join(strings.FieldsFunc(string(body), func(r rune) bool { return r == '\n' }), "; "))
	}
	c.verdict(name+" ready", err, "", "read "+up.Dir(c.upPath)+"/logs")
}

// serving shakes hands with the server as a client would: name, roots, time.
func (c *checker) serving() {
	pool := x509.NewCertPool()
	for _, r := range c.roots {
		pool.AddCert(r)
	}
	host, _, _ := net.SplitHostPort(c.file.Server.GRPC)
	ctx, cancel := context.WithTimeout(c.ctx, 5*time.Second)
	defer cancel()
	conn, err := (&tls.Dialer{Config: &tls.Config{RootCAs: pool, ServerName: host, MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}}}).DialContext(ctx, "tcp", c.file.Server.GRPC)
	if err == nil {
		conn.Close()
	}
	c.verdict("server certificate", err, "valid for "+host, "the bundle is not the server's, its certificate expired, or a clock is wrong")
}

func (c *checker) authorities() {
	conn, err := dialSocket(c.file.Server.Admin)
	if err != nil {
		c.verdict("authorities", err, "", "up.json is damaged; start the mesh again")
		return
	}
	defer conn.Close()
	c.authoritiesOf(&admin{ClientConn: conn}, "run it as the user that runs the mesh")
}

// authoritiesOf asks a server for its certificates and what is wrong with it.
func (c *checker) authoritiesOf(conn *admin, hint string) {
	ctx, cancel := context.WithTimeout(c.ctx, 5*time.Second)
	defer cancel()
	status, err := castellanv1.NewAuthorityAdminClient(conn).Status(ctx, &castellanv1.AuthorityStatusRequest{})
	if err != nil {
		c.verdict("authorities", conn.failed(err), "", hint)
		return
	}
	view, err := viewStatus(status)
	if err != nil {
		c.verdict("authorities", err, "", "the server and this command are of different versions?")
		return
	}
	for _, p := range status.GetProblems() {
		c.add("server", checkFail, p, "mend what it names; until then the last good state is in force")
	}
	for _, a := range view.Certificates {
		name := "authority " + a.Role
		left := humanDuration(time.Duration(a.SecondsLeft) * time.Second)
		switch {
		case a.state != "valid":
			c.add(name, checkFail, a.state, "the server renews it by itself; where it does not, read its log")
		case a.LifeUsedPercent > 80:
			c.add(name, checkWarn, left+" left", "it should have been renewed by now; read the server's log")
		default:
			c.add(name, checkOK, left+" left", "")
		}
	}
}

func (c *checker) workload(name string, w up.Workload) {
	c.process(name+" proxy", w.PID)
	c.ready(name+" proxy", w.Admin)
	ctx, cancel := context.WithTimeout(c.ctx, 5*time.Second)
	defer cancel()
	got, err := fetchSVIDs(ctx, w.Socket)
	hint := "the agent has no certificate for it, or its token is refused; read the agent's and the server's log"
	if err != nil {
		c.verdict(name+" SVID", err, "", hint)
		return
	}
	svid := got.DefaultSVID()
	want, err := spiffeid.FromString("spiffe://" + c.file.TrustDomain + "/ns/" + strings.Replace(name, "/", "/sa/", 1))
	if err == nil {
		check := svidCheck{chain: svid.Certificates, roots: c.roots, want: want, now: time.Now()} //nolint:forbidigo // a command line reads the real clock
		if r := check.run(); !r.Valid {
			err = fmt.Errorf("%s: %s", r.Problem, r.Reason)
		}
	}
	c.verdict(name+" SVID", err, fmt.Sprintf("%s, %s left", svid.ID, humanDuration(time.Until(svid.Certificates[0].NotAfter))), hint)
	conn, err := (&net.Dialer{Timeout: 2 * time.Second}).DialContext(c.ctx, "tcp", w.App)
	if err == nil {
		conn.Close()
	}
	c.verdict(name+" application", err, w.App, "the application does not listen; the proxy answers 503 for it")
}

// policies asks the server which documents are in force, and which workloads have
// acknowledged what they were sent.
func (c *checker) policies() {
	conn, err := dialSocket(c.file.Server.Admin)
	if err != nil {
		c.verdict("policies", err, "", "up.json is damaged; start the mesh again")
		return
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(c.ctx, 5*time.Second)
	defer cancel()
	resp, err := castellanv1.NewDiscoveryAdminClient(conn).Policies(ctx, &castellanv1.PoliciesRequest{})
	if err != nil {
		c.verdict("policies", (&admin{ClientConn: conn}).failed(err), "", "run it as the user that runs the mesh")
		return
	}
	for _, p := range resp.GetPolicies() {
		c.policy(p)
	}
	for _, w := range resp.GetWorkloads() {
		c.programmed(w)
	}
	if _, err := os.Stat(c.file.PolicyDir); err != nil {
		c.verdict("policy directory", err, "", "without it there is no policy to enforce; last good versions stay in force")
	}
}

func (c *checker) policy(p *castellanv1.PolicyStatus) {
	name := strings.TrimSpace(fmt.Sprintf("policy %s %s/%s", p.GetKind(), p.GetNamespace(), p.GetName()))
	if p.GetName() == "" {
		name = "policy file " + p.GetFile()
	}
	consequence := "mend it; where it could select a workload, that workload denies everything until then"
	if p.GetLastGoodInForce() {
		consequence = "mend it; its last good version stays in force until then"
	}
	for _, f := range p.GetFindings() {
		where := f.GetField()
		if p.GetName() != "" { // else the file is named already
			where = p.GetFile() + ": " + where
		}
		if f.GetValue() != "" {
			where += fmt.Sprintf(": %q", f.GetValue())
		}
		if f.GetSeverity() == "error" {
			c.add(name, checkFail, where+": "+f.GetReason(), consequence)
		} else {
			c.add(name, checkWarn, where+": "+f.GetReason(), "")
		}
	}
	if p.GetAccepted() {
		c.add(name, checkOK, fmt.Sprintf("in force on %d of %d workloads it selects", p.GetProgrammed(), p.GetSelected()), "")
	} else if len(p.GetFindings()) == 0 {
		c.add(name, checkFail, "refused", consequence)
	}
}

func (c *checker) programmed(w *castellanv1.WorkloadStatus) {
	name := fmt.Sprintf("workload %s/%s", w.GetNamespace(), w.GetServiceAccount())
	if w.GetDenyAll() {
		c.add(name, checkFail, "denies everything: "+w.GetDenyReason(), "mend the policy that is refused")
	}
	acked := false
	for _, s := range w.GetReport().GetStreams() {
		for _, r := range s.GetResources() {
			if !strings.HasSuffix(r.GetTypeUrl(), "castellan.v1.WorkloadPolicy") {
				continue
			}
			if r.GetNacked() != "" {
				c.add(name, checkFail, "its proxy refused policy version "+r.GetNacked()+": "+r.GetReason(), "mend the policy; what cannot be represented fails closed")
			}
			acked = acked || r.GetAcked() == w.GetVersion()
		}
	}
	if acked {
		c.add(name, checkOK, "policy version "+w.GetVersion()+" acknowledged", "")
	} else {
		c.add(name, checkWarn, "policy version "+w.GetVersion()+" is not acknowledged by any proxy", "is its proxy running?")
	}
}
