package install

import (
	"fmt"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
)

// kind is how objects of a kind are reached, and when they are applied.
type kind struct {
	schema.GroupVersionResource
	cluster bool // not in a namespace
	stage   stage
}

// stage is a step of an installation. What is in one needs what is in those before.
type stage int

const (
	stageCRDs   stage = iota // the server watches them
	stageGround              // accounts, permissions, configuration, volumes
	stageServer
	stageAgent    // needs the server's roots
	stageWebhooks // need the server to answer, from the moment they are there
)

// kinds are all that the chart has, so that the cluster need not be asked what it
// calls them.
var kinds = map[string]kind{
	"CustomResourceDefinition":       {schema.GroupVersionResource{Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"}, true, stageCRDs},
	"Namespace":                      {schema.GroupVersionResource{Version: "v1", Resource: "namespaces"}, true, stageGround},
	"ServiceAccount":                 {schema.GroupVersionResource{Version: "v1", Resource: "serviceaccounts"}, false, stageGround},
	"ConfigMap":                      {schema.GroupVersionResource{Version: "v1", Resource: "configmaps"}, false, stageGround},
	"Secret":                         {schema.GroupVersionResource{Version: "v1", Resource: "secrets"}, false, stageGround},
	"Service":                        {schema.GroupVersionResource{Version: "v1", Resource: "services"}, false, stageGround},
	"PersistentVolumeClaim":          {schema.GroupVersionResource{Version: "v1", Resource: "persistentvolumeclaims"}, false, stageGround},
	"ClusterRole":                    {schema.GroupVersionResource{Group: "rbac.authorization.k8s.io", Version: "v1", Resource: "clusterroles"}, true, stageGround},
	"ClusterRoleBinding":             {schema.GroupVersionResource{Group: "rbac.authorization.k8s.io", Version: "v1", Resource: "clusterrolebindings"}, true, stageGround},
	"Role":                           {schema.GroupVersionResource{Group: "rbac.authorization.k8s.io", Version: "v1", Resource: "roles"}, false, stageGround},
	"RoleBinding":                    {schema.GroupVersionResource{Group: "rbac.authorization.k8s.io", Version: "v1", Resource: "rolebindings"}, false, stageGround},
	"Lease":                          {schema.GroupVersionResource{Group: "coordination.k8s.io", Version: "v1", Resource: "leases"}, false, stageGround},
	"NetworkPolicy":                  {schema.GroupVersionResource{Group: "networking.k8s.io", Version: "v1", Resource: "networkpolicies"}, false, stageGround},
	"PodDisruptionBudget":            {schema.GroupVersionResource{Group: "policy", Version: "v1", Resource: "poddisruptionbudgets"}, false, stageGround},
	"CSIDriver":                      {schema.GroupVersionResource{Group: "storage.k8s.io", Version: "v1", Resource: "csidrivers"}, true, stageGround},
	"Deployment":                     {schema.GroupVersionResource{Group: "apps", Version: "v1", Resource: "deployments"}, false, stageServer},
	"DaemonSet":                      {schema.GroupVersionResource{Group: "apps", Version: "v1", Resource: "daemonsets"}, false, stageAgent},
	"MutatingWebhookConfiguration":   {schema.GroupVersionResource{Group: "admissionregistration.k8s.io", Version: "v1", Resource: "mutatingwebhookconfigurations"}, true, stageWebhooks},
	"ValidatingWebhookConfiguration": {schema.GroupVersionResource{Group: "admissionregistration.k8s.io", Version: "v1", Resource: "validatingwebhookconfigurations"}, true, stageWebhooks},
}

// ref names one object.
type ref struct {
	Kind      string `json:"kind"`
	Namespace string `json:"namespace,omitempty"`
	Name      string `json:"name"`
}

func refOf(o *unstructured.Unstructured) ref {
	return ref{Kind: o.GetKind(), Namespace: o.GetNamespace(), Name: o.GetName()}
}

func (r ref) String() string {
	if r.Namespace == "" {
		return r.Kind + " " + r.Name
	}
	return r.Kind + " " + r.Namespace + "/" + r.Name
}

// in returns the client of the object's kind.
func (r ref) in(client dynamic.Interface) (dynamic.ResourceInterface, error) {
	k, ok := kinds[r.Kind]
	switch {
	case !ok:
		return nil, fmt.Errorf("%s: a kind that this version does not know", r)
	case k.cluster:
		return client.Resource(k.GroupVersionResource), nil
	default:
		return client.Resource(k.GroupVersionResource).Namespace(r.Namespace), nil
	}
}
