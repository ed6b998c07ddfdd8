package reference_test

import (
	"testing"

	"pgregory.net/rapid"

	"castellan.dev/authz"
)

// TestAdmittedIsRepresented holds admission to the engine (rule 21): what
// Validate admits has no problem in Compile, so that fail-closed readings are for
// documents that came past admission only.
func TestAdmittedIsRepresented(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		cfg := drawConfig(t)
		cfg.DenyAll = ""
		for _, doc := range cfg.Documents {
			one := cfg
			one.Documents = cfg.Documents[:0:0]
			// Whatever the document selects, it is compiled.
			doc.Authorization.Selector, doc.Authorization.TargetRef = nil, nil
			doc.Metadata.Namespace = "shop"
			one.Documents = append(one.Documents, doc)
			_, problems := authz.Compile(one)
			refused := false
			for _, f := range authz.Validate(doc, cfg.Mesh) {
				refused = refused || f.Severity == authz.SeverityError
			}
			for _, p := range problems {
				// An unknown provider is legal, and its requests are denied (rule 22).
				if !refused && p.Field != "spec.provider.name" {
					t.Fatalf("admitted, but the engine reports %+v\n%+v", p, doc.Authorization)
				}
			}
		}
	})
}
