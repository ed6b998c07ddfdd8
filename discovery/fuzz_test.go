package discovery_test

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"castellan.dev/api/policy"
	"castellan.dev/discovery"
)

// FuzzReadDocuments: whatever stands in a file, nothing of it is lost without a
// word: a document is there, refused or not, for every part that says something.
func FuzzReadDocuments(f *testing.F) {
	for _, seed := range []string{allow("a", "x", "y") + "---" + broken("b", "x"), "a: b: c", "---\n...\n%YAML 1.2\n---\n{}", "kind: List\napiVersion: v1\nitems: [1, null, {}]",
		"--- {a: 1}\n--- [1]\n", "&a [*a]", "\x00", "? {}\n: x"} {
		f.Add([]byte(seed))
	}
	path := filepath.Join(f.TempDir(), "x.yaml")
	f.Fuzz(func(t *testing.T, data []byte) {
		must(t, os.WriteFile(path, data, 0o600))
		docs, err := discovery.ReadDocuments(path)
		if err != nil {
			t.Fatal(err)
		}
		lines := bytes.Count(data, []byte("\n")) + 1
		for _, d := range discovery.Admit(docs, policy.Mesh{}) {
			if d.Line < 1 || d.Line > lines {
				t.Errorf("line %d of %d", d.Line, lines)
			}
			if !d.Refused() && (d.Ref.Kind == "" || d.Ref.Namespace == "" || d.Ref.Name == "" || d.JSON == nil) {
				t.Errorf("a document without a name was admitted: %+v", d)
			}
		}
		again, err := discovery.ReadDocuments(path)
		if err != nil || len(again) != len(docs) {
			t.Errorf("read again: %d documents rather than %d, %v", len(again), len(docs), err)
		}
	})
}
