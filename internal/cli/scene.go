package cli

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	castellanv1 "castellan.dev/api/castellan/v1"
	"castellan.dev/api/policy"
	"castellan.dev/authz"
	"castellan.dev/discovery"
	"castellan.dev/identity"
	"castellan.dev/internal/config"
	"castellan.dev/internal/jws"
	"castellan.dev/internal/kube"
	"castellan.dev/internal/up"
	"castellan.dev/internal/workloads"
)

const (
	// settingsName and settingsKey are where the server's configuration is.
	settingsName = "castellan-server"
	settingsKey  = "server.yaml"
	// askTimeout bounds what is asked of the server for completeness only.
	askTimeout = 10 * time.Second
)

// scene is the mesh that decisions are taken in, as it is now.
type scene struct {
	mesh   policy.Mesh
	domain spiffeid.TrustDomain
	docs   []policy.Document
	// findings are warnings about docs.
	findings []authz.Finding
	// refused are the cluster's documents that are invalid as they are written.
	refused []discovery.FileDocument
	// known is who is there; nil where there is nobody to ask.
	known *workloads.File
	// caller is who asks, the zero ID without a certificate.
	caller spiffeid.ID
	// keys of end-user issuers that have been fetched, by source; nil for one that failed.
	keys map[string]*jws.KeySet
	// cluster that it is one, with the namespace that names without one are in.
	cluster   bool
	namespace string
	// status is what the server says became of it all, unasked why it does not.
	status  *castellanv1.PoliciesResponse
	unasked error
}

// settle takes the mesh settings.
func (s *scene) settle(mesh policy.Mesh) error {
	s.mesh = mesh
	var err error
	s.domain, err = identity.ParseTrustDomain(mesh.TrustDomain)
	return err
}

// take sorts documents that have been admitted.
func (s *scene) take(docs []discovery.FileDocument) {
	for _, d := range docs {
		if d.Refused() {
			s.refused = append(s.refused, d)
			continue
		}
		s.docs = append(s.docs, d.Document)
		s.findings = append(s.findings, d.Findings...)
	}
}

// localScene is of files, and of a mesh on this machine if upPath is not empty.
func (e *env) localScene(files []string, meshFile, upPath string) (*scene, error) {
	s := &scene{}
	trustDomain := ""
	if upPath != "" {
		file, err := up.ReadFile(upPath)
		if err != nil {
			return nil, err
		}
		data, err := readNamedFile("--up", up.WorkloadsFile(upPath))
		if err != nil {
			return nil, err
		}
		if s.known, err = workloads.Parse(data); err != nil {
			return nil, fmt.Errorf("%s: %w", up.WorkloadsFile(upPath), err)
		}
		trustDomain = file.TrustDomain
		if len(files) == 0 {
			files = []string{file.PolicyDir}
		}
	}
	mesh, err := loadMesh(meshFile, trustDomain)
	if err != nil {
		return nil, err
	}
	if err := s.settle(mesh); err != nil {
		return nil, err // loadMesh has checked it
	}
	return s, e.takeFiles(s, files)
}

// takeFiles reads policies that the user names: each must be valid.
func (e *env) takeFiles(s *scene, files []string) error {
	docs, err := e.readPolicies(files, s.mesh)
	if err != nil {
		return err
	}
	if err := refusal(docs); err != nil {
		if perr := e.explainRefusal(docs); perr != nil {
			return perr
		}
		return err
	}
	if len(docs) == 0 {
		fmt.Fprintf(e.err, "castellan: %s: no policy there; the decision is that of a mesh without any\n", strings.Join(files, ", "))
	}
	s.take(docs)
	return nil
}

// explainRefusal says on stderr which documents are invalid, and why.
func (e *env) explainRefusal(docs []discovery.FileDocument) error {
	refused := slices.DeleteFunc(slices.Clone(docs), func(d discovery.FileDocument) bool { return !d.Refused() })
	return (&env{out: e.err}).printDocuments(refused, "table")
}

// clusterScene reads what decides over the workloads of one namespace, with the
// caller's own permissions: the mesh settings, its pods and services, and its
// policies and those of the root namespace. files, if any, stand for the policies.
func (e *env) clusterScene(ctx context.Context, flags *meshFlags, namespace string, files []string, meshFile string) (*scene, error) {
	ctx, cancel := context.WithTimeout(ctx, tunnelTimeout)
	defer cancel()
	client, err := flags.client()
	if err != nil {
		return nil, err
	}
	s := &scene{cluster: true, namespace: namespace}
	mesh, err := clusterMesh(ctx, client, meshFile)
	if err != nil {
		return nil, err
	}
	if err := s.settle(mesh); err != nil {
		return nil, err
	}
	if s.known, err = client.ReadInventory(ctx, namespace); err != nil {
		return nil, apiError(err, "list", "pods, services and endpointslices", namespace)
	}
	if len(files) > 0 {
		return s, e.takeFiles(s, files)
	}
	spaces := []string{namespace}
	if s.mesh.RootNamespace != namespace {
		spaces = append(spaces, s.mesh.RootNamespace)
	}
	objects, err := client.ReadPolicies(ctx, spaces...)
	if err != nil {
		return nil, apiError(err, "list", "the policies of security.istio.io", strings.Join(spaces, " and "))
	}
	s.take(discovery.Admit(discovery.ReadObjects(objects), s.mesh))
	s.status, s.unasked = askStatus(ctx, client)
	return s, nil
}

// clusterMesh reads the settings of the server's configuration, unless a file has them.
func clusterMesh(ctx context.Context, client *kube.Client, meshFile string) (policy.Mesh, error) {
	if meshFile != "" {
		return loadMesh(meshFile, "")
	}
	m, err := client.Kubernetes().CoreV1().ConfigMaps(client.Namespace()).Get(ctx, settingsName, metav1.GetOptions{})
	if err != nil {
		return policy.Mesh{}, fmt.Errorf("mesh settings: %w; or give them with --mesh FILE", apiError(err, "get", "configmaps", client.Namespace()))
	}
	var server config.Server
	if err := config.Unmarshal([]byte(m.Data[settingsKey]), &server); err != nil {
		return policy.Mesh{}, fmt.Errorf("mesh settings: ConfigMap %s/%s, key %s: %w; or give them with --mesh FILE", client.Namespace(), settingsName, settingsKey, err)
	}
	if err := config.CheckMesh(&server.Mesh); err != nil {
		return policy.Mesh{}, fmt.Errorf("mesh settings: ConfigMap %s/%s, key %s: mesh.%w", client.Namespace(), settingsName, settingsKey, err)
	}
	return server.Mesh, nil
}

// askStatus asks the server what became of everything. Most who may ask what policy
// says may not run programs in the server's pod: then it stays unknown.
func askStatus(ctx context.Context, client *kube.Client) (*castellanv1.PoliciesResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	conn, err := tunnelled(client.DialServer(ctx))
	if err != nil {
		return nil, err
	}
	return statusOver(ctx, conn)
}

// statusOver asks over a connection, and closes it.
func statusOver(ctx context.Context, conn *admin) (*castellanv1.PoliciesResponse, error) {
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	resp, err := castellanv1.NewDiscoveryAdminClient(conn).Policies(ctx, &castellanv1.PoliciesRequest{})
	if err != nil {
		return nil, conn.failed(err)
	}
	return resp, nil
}

// statusOf is what became of one document; nil where nobody could say.
func (s *scene) statusOf(ref discovery.Ref) *castellanv1.PolicyStatus {
	for _, p := range s.status.GetPolicies() {
		if p.GetKind() == ref.Kind && p.GetNamespace() == ref.Namespace && p.GetName() == ref.Name {
			return p
		}
	}
	return nil
}

// proxyOf is what the server knows of a pod's proxy; nil where nobody could say.
func (s *scene) proxyOf(uid string) *castellanv1.WorkloadStatus {
	for _, w := range s.status.GetWorkloads() {
		if w.GetPodUid() == uid {
			return w
		}
	}
	return nil
}

// enforcement says whether what is written is what a workload's proxy enforces, and
// why not. deny, if not empty, is why it denies everything.
type enforcement struct {
	deny  string
	known bool
	// notes are why it is not as written.
	notes []string
}

// enforced asks about one workload. Where a document that could select it is refused,
// and nobody can say that an earlier version of it is in force, it is taken to deny
// everything, as it then does.
func (s *scene) enforced(w *workloads.Workload) enforcement {
	out := enforcement{known: s.status != nil}
	for _, d := range s.refused {
		if !d.CouldSelect(w.Namespace, w.Labels, s.mesh) {
			continue
		}
		status := s.statusOf(d.Ref)
		switch {
		case status.GetLastGoodInForce():
			out.notes = append(out.notes, fmt.Sprintf("%s is refused as it is written; its last good version is in force, which is not judged here", d.Ref))
		case status != nil:
			out.deny = fmt.Sprintf("%s was refused and has no last good version", d.Ref)
		default:
			out.deny = fmt.Sprintf("%s is refused as it is written; unless an earlier version of it is in force, everything is denied", d.Ref)
		}
	}
	if s.status == nil || w.OutsideMesh {
		return out
	}
	status, name := s.proxyOf(w.PodUID), "pod "+w.PodName
	if w.PodName == "" {
		name = "workload " + w.Namespace + "/" + w.ServiceAccount
	}
	if status == nil {
		out.notes = append(out.notes, name+": the server does not know it yet")
		return out
	}
	if status.GetDenyAll() && out.deny == "" {
		out.deny = status.GetDenyReason()
	}
	if v := viewProxy(status, s.domain.Name(), now()); !v.ok() && v.State != proxyDenies {
		out.notes = append(out.notes, fmt.Sprintf("%s does not enforce it as it is now: %s: %s", name, v.State, v.Reason))
	}
	return out
}
