package install

import (
	"fmt"
	"io"
	"slices"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"
)

// Write prints all objects as YAML, in the order in which they are applied: kubectl
// apply takes it.
func (r *Rendered) Write(w io.Writer) error {
	all := slices.Concat([]*unstructured.Unstructured{namespaceObject(r.Namespace)}, r.CRDs)
	for s := stageGround; s <= stageWebhooks; s++ {
		for _, o := range r.Objects {
			if kinds[o.GetKind()].stage == s {
				all = append(all, o)
			}
		}
	}
	for _, o := range all {
		text, err := yaml.Marshal(o.Object)
		if err != nil {
			return fmt.Errorf("%s: %w", refOf(o), err)
		}
		if _, err := fmt.Fprintf(w, "---\n%s", text); err != nil {
			return err
		}
	}
	return nil
}
