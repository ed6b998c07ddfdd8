package kube

import (
	"bytes"
	"encoding/json"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
)

// policyObject is what is kept of a policy: its text once, as it travels to
// proxies, and its status for the next that is written. It is immutable.
type policyObject struct {
	metav1.TypeMeta
	metav1.ObjectMeta
	json []byte
	// status is the object's status as JSON, empty if it has none.
	status []byte
}

// DeepCopyObject implements runtime.Object. Nobody changes an object that is kept.
func (o *policyObject) DeepCopyObject() runtime.Object { return o }

// says reports whether two versions say the same.
func (o *policyObject) says(other *policyObject) bool {
	return o.UID == other.UID && o.Generation == other.Generation && bytes.Equal(o.json, other.json)
}

// reducePolicy keeps of a policy what decides, and of its metadata what hangs
// together with that: tools write annotations all the time, and none of that must
// make proxies compile again.
func reducePolicy(o runtime.Object) runtime.Object {
	u, ok := o.(*unstructured.Unstructured)
	if !ok {
		return o
	}
	meta := map[string]any{"name": u.GetName(), "namespace": u.GetNamespace()}
	if uid := string(u.GetUID()); uid != "" {
		meta["uid"] = uid
	}
	if g := u.GetGeneration(); g != 0 {
		meta["generation"] = g
	}
	if t := u.GetCreationTimestamp(); !t.IsZero() {
		meta["creationTimestamp"] = t.UTC().Format("2006-01-02T15:04:05Z")
	}
	if labels := u.GetLabels(); len(labels) > 0 {
		meta["labels"] = labels
	}
	annotations := map[string]string{}
	for k, v := range u.GetAnnotations() {
		if domain, _, _ := strings.Cut(k, "/"); strings.HasSuffix(domain, "istio.io") || strings.HasSuffix(domain, "castellan.dev") {
			annotations[k] = v
		}
	}
	if len(annotations) > 0 {
		meta["annotations"] = annotations
	}
	kept := map[string]any{"apiVersion": u.GetAPIVersion(), "kind": u.GetKind(), "metadata": meta}
	for field, value := range u.Object {
		// A field that is not known here is for whoever decodes the policy to refuse.
		if field != "apiVersion" && field != "kind" && field != "metadata" && field != "status" {
			kept[field] = value
		}
	}
	out := &policyObject{ObjectMeta: metav1.ObjectMeta{Name: u.GetName(), Namespace: shared(u.GetNamespace()), UID: u.GetUID(),
		ResourceVersion: u.GetResourceVersion(), Generation: u.GetGeneration()}}
	out.json = encode(kept)
	if status, ok := u.Object["status"].(map[string]any); ok && len(status) > 0 {
		out.status = encode(status)
	}
	return out
}

// encode writes what came from JSON as JSON, which cannot fail; were it to, the
// object would be refused for being empty.
func encode(v any) []byte {
	data, err := json.Marshal(v)
	if err != nil {
		return nil
	}
	return bytes.Clone(data) // without spare capacity
}
