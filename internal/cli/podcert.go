package cli

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	castellanv1 "castellan.dev/api/castellan/v1"
	"castellan.dev/identity"
	"castellan.dev/internal/disk"
	"castellan.dev/internal/kube"
)

const (
	// bundleName and bundleKey are where the server publishes the roots.
	bundleName = "castellan-bundle"
	bundleKey  = "bundle.pem"
)

// podCert is what a pod's agent serves to it now, judged by what the API server
// says of the pod. There is no key in it: an agent gives none away.
type podCert struct {
	Namespace      string `json:"namespace"`
	Pod            string `json:"pod"`
	Node           string `json:"node"`
	ServiceAccount string `json:"serviceAccount"`
	// Status is the agent's: starting, valid, refused or expired.
	Status string `json:"status"`
	// Problem is the kind of the last failure, empty when there was none.
	Problem  string     `json:"problem,omitempty"`
	RenewsAt *time.Time `json:"renewsAt,omitempty"`
	// Roots is where the roots are from that the chain was verified with.
	Roots        string       `json:"roots"`
	Verification verifyResult `json:"verification"`
	Certificates []certView   `json:"certificates"`

	chain, roots []*x509.Certificate
}

// ok: the pod has a certificate that its callers take for its own.
func (p *podCert) ok() bool { return p.Status == "valid" && p.Verification.Valid }

// podCertificate asks the agent on the pod's node.
func (e *env) podCertificate(ctx context.Context, mesh *meshFlags, ref podRef) (*podCert, error) {
	ctx, cancel := context.WithTimeout(ctx, tunnelTimeout)
	defer cancel()
	client, err := mesh.client()
	if err != nil {
		return nil, err
	}
	namespace, err := mesh.namespace()
	if err != nil {
		return nil, err
	}
	pod, err := ref.find(ctx, client, namespace)
	if err != nil {
		return nil, err
	}
	if pod.Spec.NodeName == "" {
		return nil, fmt.Errorf("pod %s/%s is on no node yet; see `kubectl describe pod -n %s %s`", pod.Namespace, pod.Name, pod.Namespace, pod.Name)
	}
	conn, err := agentOf(ctx, client, pod.Spec.NodeName)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	resp, err := castellanv1.NewAgentAdminClient(conn).Certificates(ctx, &castellanv1.CertificatesRequest{PodUid: string(pod.UID)})
	if err != nil {
		return nil, conn.failed(err)
	}
	for _, w := range resp.GetWorkloads() {
		if w.GetPodUid() == string(pod.UID) {
			return e.judgePod(ctx, client, pod, w, resp.GetRoots())
		}
	}
	return nil, fmt.Errorf("the agent on node %s serves nothing to pod %s/%s: it has no volume of csi.castellan.dev, or that is not mounted yet; "+
		"was its namespace labelled for injection before the pod was made?", pod.Spec.NodeName, pod.Namespace, pod.Name)
}

// judgePod verifies what the agent says by what others say: the API server of whose
// pod it is, and the server's published roots, if the caller may read them.
func (e *env) judgePod(ctx context.Context, client *kube.Client, pod *corev1.Pod, w *castellanv1.WorkloadCertificate, roots [][]byte) (*podCert, error) {
	out := &podCert{
		Namespace: pod.Namespace, Pod: pod.Name, Node: pod.Spec.NodeName, ServiceAccount: pod.Spec.ServiceAccountName,
		Status: w.GetStatus(), Problem: w.GetProblem(), Certificates: []certView{},
	}
	if at := w.GetRenewsAt(); at != nil {
		when := at.AsTime()
		out.RenewsAt = &when
	}
	var err error
	if out.chain, err = parseDER(w.GetChain()); err != nil {
		return nil, fmt.Errorf("what the agent serves to pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	published, err := publishedRoots(ctx, client)
	out.Roots = fmt.Sprintf("ConfigMap %s/%s", client.Namespace(), bundleName)
	if err != nil {
		fmt.Fprintf(e.err, "castellan: verified with the roots that the agent itself has: %v\n", err)
		out.Roots = "the agent"
		if published, err = parseDER(roots); err != nil {
			return nil, fmt.Errorf("the agent's roots: %w", err)
		}
	}
	out.roots = published
	now := time.Now() //nolint:forbidigo // a command line reads the real clock
	out.Certificates = describeChain(out.chain, now)
	out.Verification = out.verify(now)
	return out, nil
}

// verify takes the pod's service account for the identity that the chain must have.
func (p *podCert) verify(now time.Time) verifyResult {
	switch {
	case len(p.chain) == 0:
		return *fail("no certificate", "read the agent's and the server's log: "+p.Problem, "the agent has none for this pod (%s)", p.Status)
	case len(p.roots) == 0:
		return *fail("no roots", "the server publishes them when it is ready", "there is nothing to verify it with")
	}
	account, err := identity.NewAccount(p.Namespace, p.ServiceAccount)
	if err != nil {
		return *fail("no identity", "", "%v", err)
	}
	// The roots say which trust domain it is; where they do not, the chain's own is
	// taken, and the signature decides.
	td := trustDomainOf(p.roots)
	if td.IsZero() {
		if id, err := identity.FromCertificate(p.chain[0]); err == nil {
			td = id.TrustDomain()
		}
	}
	check := svidCheck{chain: p.chain, roots: p.roots, trustDomain: td, now: now}
	if w, err := identity.New(td, account); err == nil {
		check.want = w.ID()
	}
	return check.run()
}

func parseDER(certs [][]byte) ([]*x509.Certificate, error) {
	out := make([]*x509.Certificate, 0, len(certs))
	for _, der := range certs {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		out = append(out, c)
	}
	return out, nil
}

// publishedRoots reads what the server publishes.
func publishedRoots(ctx context.Context, client *kube.Client) ([]*x509.Certificate, error) {
	m, err := client.Kubernetes().CoreV1().ConfigMaps(client.Namespace()).Get(ctx, bundleName, metav1.GetOptions{})
	if err != nil {
		return nil, apiError(err, "get", "configmaps", client.Namespace())
	}
	return parseCertificates([]byte(m.Data[bundleKey]), fmt.Sprintf("ConfigMap %s/%s, key %s,", client.Namespace(), bundleName, bundleKey))
}

// trustDomainOf is that of the roots' own URI SANs where they agree; else zero.
func trustDomainOf(roots []*x509.Certificate) spiffeid.TrustDomain {
	var td spiffeid.TrustDomain
	for _, r := range roots {
		if len(r.URIs) != 1 {
			return spiffeid.TrustDomain{}
		}
		id, err := spiffeid.FromURI(r.URIs[0])
		if err != nil || (!td.IsZero() && td != id.TrustDomain()) {
			return spiffeid.TrustDomain{}
		}
		td = id.TrustDomain()
	}
	return td
}

// inspectPod shows what a pod is served, and answers negatively where that is no good.
func (e *env) inspectPod(ctx context.Context, mesh *meshFlags, ref podRef, format string) (*podCert, error) {
	stop := e.progress("asking the agent of " + ref.String())
	p, err := e.podCertificate(ctx, mesh, ref)
	stop()
	if err != nil {
		return nil, err
	}
	switch format {
	case "pem":
		err = writePEM(e.out, p.chain)
	case "table":
		err = e.printPod(p)
	default:
		err = writeData(e.out, format, p)
	}
	if err == nil && !p.ok() {
		err = errNegative
	}
	return p, err
}

func (e *env) printPod(p *podCert) error {
	colored := color(e.out)
	fmt.Fprintf(e.out, "pod %s/%s on node %s, service account %s\n", visible(p.Namespace), visible(p.Pod), visible(p.Node), visible(p.ServiceAccount))
	status := p.Status
	if p.Problem != "" {
		status += ", last failure: " + p.Problem
	}
	if p.RenewsAt != nil {
		status += ", renews at " + p.RenewsAt.Format(time.RFC3339)
	}
	verdict := "verified    with the roots of " + p.Roots + "; it is the pod's own identity"
	if !p.Verification.Valid {
		verdict = alarm(fmt.Sprintf("NOT VALID   %s: %s", p.Verification.Problem, visible(p.Verification.Reason)), colored)
	}
	if p.Status != "valid" {
		status = alarm(status, colored)
	}
	if _, err := fmt.Fprintf(e.out, "status      %s\n%s\n", status, verdict); err != nil {
		return err
	}
	if p.Verification.Hint != "" {
		fmt.Fprintf(e.err, "hint: %s\n", visible(p.Verification.Hint))
	}
	return printChain(e.out, p.Certificates, colored)
}

// fetchPod writes what a pod is served to a directory, or shows it. A key is never
// among it, as none leaves the agent but to the pod itself.
func (e *env) fetchPod(ctx context.Context, mesh *meshFlags, ref podRef, dir, format string) error {
	if dir == "" {
		_, err := e.inspectPod(ctx, mesh, ref, format)
		return err
	}
	stop := e.progress("asking the agent of " + ref.String())
	p, err := e.podCertificate(ctx, mesh, ref)
	stop()
	if err != nil {
		return err
	}
	if !p.ok() {
		// What callers would refuse is not left lying about as if it were good.
		return errors.Join(e.printPod(p), errNegative)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("--out: %w", err)
	}
	for _, file := range []struct {
		name  string
		certs []*x509.Certificate
	}{{"svid.pem", p.chain}, {"bundle.pem", p.roots}} {
		if err := disk.Write(filepath.Join(dir, file.name), encodePEM(file.certs), 0o644); err != nil {
			return fmt.Errorf("--out: %w", err)
		}
	}
	fmt.Fprintf(e.err, "%s: svid.pem, bundle.pem of pod %s/%s (%s, valid until %s); its key stays where it is\n",
		dir, p.Namespace, p.Pod, p.Verification.SPIFFEID, p.chain[0].NotAfter.UTC().Format(time.RFC3339))
	return nil
}
