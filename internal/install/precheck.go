package install

import (
	"context"
	"fmt"
	"slices"

	authorizationv1 "k8s.io/api/authorization/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/version"
	"sigs.k8s.io/yaml"

	"castellan.dev/internal/config"
	"castellan.dev/webhook"
)

// Precheck says whether a cluster can take what is rendered. It changes nothing.
func (in *Installer) Precheck(ctx context.Context, r *Rendered) []Result {
	var out results
	for _, check := range []func(context.Context, *Rendered, *results){
		in.preVersion, in.prePermissions, in.preExisting, in.preNamespace, in.preCRDs,
		in.preInjectors, in.preDriver, in.preNodes, in.preVolume, in.preTrustDomain,
	} {
		if ctx.Err() != nil {
			out.fail("time", "give more with --timeout", "not everything was checked: %v", ctx.Err())
			return out
		}
		check(ctx, r, &out)
	}
	return out
}

func (in *Installer) preVersion(_ context.Context, _ *Rendered, out *results) {
	const check = "Kubernetes version"
	text, err := in.KubeVersion()
	if err != nil {
		out.fail(check, "is the cluster up, and the kubeconfig its own?", "%v", err)
		return
	}
	v, err := version.ParseGeneric(text)
	if err != nil {
		out.unknown(check, err)
		return
	}
	if v.LessThan(version.MustParseGeneric(OldestKubernetes)) {
		out.fail(check, "upgrade the cluster: native sidecars and what else Castellan uses came with "+OldestKubernetes, "%s is older than %s", text, OldestKubernetes)
		return
	}
	out.ok(check, "%s", text)
}

// prePermissions asks for every kind that is applied; the answer to one question
// of another kind of caller (an administrator of all) would not do.
func (in *Installer) prePermissions(ctx context.Context, r *Rendered, out *results) {
	const check = "your permissions"
	asked := map[string]bool{}
	var missing []string
	ask := func(verb string, k kind, namespace string) error {
		attributes := &authorizationv1.ResourceAttributes{Verb: verb, Group: k.Group, Resource: k.Resource}
		if !k.cluster {
			attributes.Namespace = namespace
		}
		key := fmt.Sprint(*attributes)
		if asked[key] {
			return nil
		}
		asked[key] = true
		answer, err := in.cfg.Kubernetes.AuthorizationV1().SelfSubjectAccessReviews().Create(ctx,
			&authorizationv1.SelfSubjectAccessReview{Spec: authorizationv1.SelfSubjectAccessReviewSpec{ResourceAttributes: attributes}}, metav1.CreateOptions{})
		if err == nil && !answer.Status.Allowed {
			missing = append(missing, verb+" "+k.GroupResource().String())
		}
		return err
	}
	objects := slices.Concat([]*unstructured.Unstructured{namespaceObject(in.cfg.Namespace)}, r.CRDs, r.Objects)
	for _, o := range objects {
		for _, verb := range []string{"get", "create", "patch", "delete"} {
			if err := ask(verb, kinds[o.GetKind()], in.cfg.Namespace); err != nil {
				out.unknown(check, err)
				return
			}
		}
	}
	if len(missing) > 0 {
		out.fail(check, "install as a cluster administrator; what is installed has permissions that only such a one may grant", "you may not %s", some(missing))
		return
	}
	out.ok(check, "%s asked for", count(len(asked), "permission"))
}

func (in *Installer) preExisting(ctx context.Context, r *Rendered, out *results) {
	const check = "existing installation"
	for _, o := range r.Objects {
		live, err := in.get(ctx, refOf(o))
		if err != nil {
			out.unknown(check, err)
			return
		}
		if live == nil || kept(live) {
			continue // what a former installation left behind is taken over
		}
		if by := live.GetLabels()[labelManagedBy]; by != "" && by != manager {
			out.fail(check, fmt.Sprintf("upgrade it with %s, or remove it first", by), "%s is managed by %s", refOf(o), by)
			return
		}
	}
	elsewhere, err := in.elsewhere(ctx)
	if err != nil {
		out.unknown(check, err)
		return
	}
	if elsewhere != "" {
		out.fail(check, "a cluster has one: change that with -n "+elsewhere+", or remove it first", "Castellan is in namespace %s", elsewhere)
		return
	}
	inv, err := in.readInventory(ctx)
	switch {
	case err != nil:
		out.unknown(check, err)
	case inv == nil:
		out.ok(check, "none")
	default:
		out.ok(check, "%s, which will be changed to %s", inv.AppVersion, r.AppVersion)
	}
}

// elsewhere is another namespace whose server has the cluster's one binding.
func (in *Installer) elsewhere(ctx context.Context) (string, error) {
	binding, err := in.get(ctx, ref{Kind: "ClusterRoleBinding", Name: "castellan-server"})
	if err != nil || binding == nil {
		return "", err
	}
	subjects, _, err := unstructured.NestedSlice(binding.Object, "subjects")
	if err != nil {
		return "", err
	}
	for _, s := range subjects {
		if subject, ok := s.(map[string]any); ok {
			if ns, ok := subject["namespace"].(string); ok && ns != in.cfg.Namespace {
				return ns, nil
			}
		}
	}
	return "", nil
}

func (in *Installer) preNamespace(ctx context.Context, _ *Rendered, out *results) {
	check := "namespace " + in.cfg.Namespace
	live, err := in.get(ctx, ref{Kind: "Namespace", Name: in.cfg.Namespace})
	if err != nil {
		out.unknown(check, err)
		return
	}
	if live == nil {
		out.ok(check, "will be made")
		return
	}
	if has := live.GetLabels()[labelEnforce]; has != "" && has != privileged {
		out.fail(check, fmt.Sprintf("kubectl label namespace %s --overwrite %s=%s", in.cfg.Namespace, labelEnforce, privileged),
			"its label %s=%s keeps the agents' pods out, which use the node's own directories", labelEnforce, has)
		return
	}
	if live.GetDeletionTimestamp() != nil {
		out.fail(check, "wait until it is gone", "it is being deleted")
		return
	}
	out.ok(check, "exists")
}

func (in *Installer) preCRDs(ctx context.Context, r *Rendered, out *results) {
	const check = "policy CRDs"
	var foreign []string
	for _, crd := range r.CRDs {
		live, err := in.get(ctx, refOf(crd))
		if err != nil {
			out.unknown(check, err)
			return
		}
		if live == nil || live.GetLabels()[labelManagedBy] == manager {
			continue
		}
		if !serves(live, "v1") {
			out.fail(check, "upgrade Istio's CRDs to 1.22 or later", "the %s that is installed does not serve v1", crd.GetName())
			return
		}
		foreign = append(foreign, crd.GetName())
	}
	if len(foreign) > 0 {
		out.ok(check, "those of another installation are used: %s", some(foreign))
		return
	}
	out.ok(check, "%s to install", count(len(r.CRDs), "kind"))
}

func serves(crd *unstructured.Unstructured, want string) bool {
	versions, _, _ := unstructured.NestedSlice(crd.Object, "spec", "versions")
	return slices.ContainsFunc(versions, func(v any) bool {
		m, ok := v.(map[string]any)
		return ok && m["name"] == want && m["served"] == true
	})
}

// preInjectors refuses to be the second injector of a pod.
func (in *Installer) preInjectors(ctx context.Context, r *Rendered, out *results) {
	const check = "other injectors"
	cfg, err := serverConfig(r)
	if err != nil {
		out.unknown(check, err)
		return
	}
	if cfg.Webhook == nil || find(r, "MutatingWebhookConfiguration", webhook.InjectorConfiguration) == nil {
		out.ok(check, "not looked for: nothing is injected")
		return
	}
	injector, err := webhook.NewInjector(cfg.Webhook.Inject, in.cfg.Namespace)
	if err != nil {
		out.unknown(check, err)
		return
	}
	list, err := in.cfg.Kubernetes.AdmissionregistrationV1().MutatingWebhookConfigurations().List(ctx, metav1.ListOptions{})
	if err != nil {
		out.unknown(check, err)
		return
	}
	namespaces, err := in.cfg.Kubernetes.CoreV1().Namespaces().List(ctx, metav1.ListOptions{})
	if err != nil {
		out.unknown(check, err)
		return
	}
	var known []webhook.Namespace
	for _, ns := range namespaces.Items {
		known = append(known, webhook.Namespace{Name: ns.Name, Labels: ns.Labels})
	}
	conflicts := injector.Conflicts(list.Items, webhook.InjectorConfiguration, known)
	for _, c := range conflicts {
		out.fail(check, "leave the usual labels to the other: --set injection.defaultRevision=false, and label namespaces istio.io/rev="+cfg.Webhook.Inject.Revision+
			"; or remove the other: kubectl delete mutatingwebhookconfiguration "+c.Configuration, "%s", c)
	}
	if len(conflicts) == 0 {
		out.ok(check, "none that selects the same pods")
	}
}

// serverConfig is the server's configuration as rendered.
func serverConfig(r *Rendered) (*config.Server, error) {
	o := find(r, "ConfigMap", "castellan-server")
	if o == nil {
		return nil, fmt.Errorf("the chart has no configuration of the server")
	}
	text, _, err := unstructured.NestedString(o.Object, "data", "server.yaml")
	if err != nil {
		return nil, err
	}
	var cfg config.Server
	return &cfg, config.Unmarshal([]byte(text), &cfg)
}

func find(r *Rendered, kind, name string) *unstructured.Unstructured {
	for _, o := range r.Objects {
		if o.GetKind() == kind && o.GetName() == name {
			return o
		}
	}
	return nil
}

func (in *Installer) preDriver(ctx context.Context, _ *Rendered, out *results) {
	const check = "CSI driver"
	live, err := in.get(ctx, ref{Kind: "CSIDriver", Name: Driver})
	if err != nil {
		out.unknown(check, err)
		return
	}
	if live == nil {
		out.ok(check, "%s will be made", Driver)
		return
	}
	out.ok(check, "%s exists", Driver)
}

// preTrustDomain: a root is for one trust domain.
func (in *Installer) preTrustDomain(ctx context.Context, r *Rendered, out *results) {
	const check = "trust domain"
	cfg, err := serverConfig(r)
	if err != nil {
		out.unknown(check, err)
		return
	}
	want := cfg.Mesh.TrustDomain
	live, err := in.get(ctx, ref{Kind: "ConfigMap", Namespace: in.cfg.Namespace, Name: "castellan-server"})
	if err != nil {
		out.unknown(check, err)
		return
	}
	if live != nil {
		text, _, _ := unstructured.NestedString(live.Object, "data", "server.yaml")
		var before struct {
			Mesh struct {
				TrustDomain string `json:"trustDomain"`
			} `json:"mesh"`
		}
		if err := yaml.Unmarshal([]byte(text), &before); err == nil && before.Mesh.TrustDomain != "" && before.Mesh.TrustDomain != want {
			out.fail(check, "give --set mesh.trustDomain="+before.Mesh.TrustDomain+", or begin anew: castellan uninstall --purge",
				"it is %s now and would be %s: every identity would change", before.Mesh.TrustDomain, want)
			return
		}
	}
	secret, err := in.get(ctx, ref{Kind: "Secret", Namespace: in.cfg.Namespace, Name: "castellan-ca"})
	if err == nil && secret != nil && live == nil {
		if data, _, _ := unstructured.NestedMap(secret.Object, "data"); len(data) > 0 {
			out.ok(check, "%s; the root of a former installation is used again", want)
			return
		}
	}
	out.ok(check, "%s", want)
}
