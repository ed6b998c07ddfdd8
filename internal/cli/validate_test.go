package cli_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

type documentView struct {
	File      string `json:"file"`
	Line      int    `json:"line"`
	Kind      string `json:"kind"`
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	Valid     bool   `json:"valid"`
	Findings  []struct {
		Severity string `json:"severity"`
		Field    string `json:"field"`
		Value    string `json:"value"`
		Reason   string `json:"reason"`
	} `json:"findings"`
}

func TestValidate(t *testing.T) {
	good := writeFile(t, "good.yaml", []byte(policyOf("good", `{rules: [{from: [{source: {namespaces: [shop]}}]}]}`)))
	risky := writeFile(t, "risky.yaml", []byte(policyOf("risky", "{action: ALLOW}")))
	bad := writeFile(t, "bad.yaml", []byte("# a comment\n"+policyOf("bad", "{action: PERMIT}")+policyOf("good-too", `{rules: [{from: [{source: {namespaces: [shop]}}]}]}`)))

	t.Run("valid", func(t *testing.T) {
		r := castellanRun(t, "authz", "validate", "-f", good).want(t, 0)
		if r.out != good+":2: AuthorizationPolicy shop/good: valid\n" || r.err != "" {
			t.Errorf("stdout %q, stderr %q", r.out, r.err)
		}
	})
	t.Run("warnings are allowed", func(t *testing.T) {
		var got []documentView
		castellanRun(t, "authz", "validate", "-f", risky, "-o", "json").want(t, 0).decode(t, &got)
		if len(got) != 1 || !got[0].Valid || len(got[0].Findings) == 0 || got[0].Findings[0].Severity != "warning" {
			t.Errorf("%+v", got)
		}
		castellanRun(t, "authz", "validate", "-f", risky).want(t, 0, ": valid\n    warning: spec")
	})
	t.Run("invalid: file, field, value and reason", func(t *testing.T) {
		r := castellanRun(t, "authz", "validate", "-f", bad).want(t, 3, bad+":3: AuthorizationPolicy shop/bad: INVALID\n", `    error: spec.action: "PERMIT": `, "shop/good-too: valid")
		if r.err != "castellan: 1 of 2 documents are invalid\n" {
			t.Errorf("%q", r.err)
		}
		var got []documentView
		castellanRun(t, "authz", "validate", "-f", bad, "-o", "json").want(t, 3).decode(t, &got)
		if len(got) != 2 || got[0].Valid || !got[1].Valid || got[0].Line != 3 || got[0].File != bad || got[0].Name != "bad" || got[0].Namespace != "shop" || got[0].Kind != "AuthorizationPolicy" {
			t.Fatalf("%+v", got)
		}
		if f := got[0].Findings[0]; f.Severity != "error" || f.Field != "spec.action" || f.Value != "PERMIT" || f.Reason == "" {
			t.Errorf("%+v", f)
		}
		castellanRun(t, "authz", "validate", "-f", bad, "-o", "yaml").want(t, 3, "field: spec.action")
	})
	t.Run("several at once, stdin, directory", func(t *testing.T) {
		castellanRun(t, "authz", "validate", "-f", good, "-f", risky).want(t, 0, "shop/good: valid", "shop/risky: valid")
		castellanRun(t, "authz", "validate", "-f", good, "-f", writeFile(t, "copy.yaml", []byte(readFile(t, good)))).want(t, 3, "another AuthorizationPolicy of this name stands at")
		// One file by two names is one file; and "-f *.yaml" is what a shell makes of it.
		castellanRun(t, "authz", "validate", "-f", good, "-f", filepath.Dir(good)).want(t, 0, "shop/good: valid")
		castellanRun(t, "authz", "validate", "-f", good, risky).want(t, 0, "shop/good: valid", "shop/risky: valid")
		castellanWith(t, readFile(t, good), "authz", "validate", "-f", "-").want(t, 0, "standard input:")
		dir := t.TempDir()
		for _, name := range []string{"a.yaml", "b.yml"} {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(policyOf(strings.TrimSuffix(name, filepath.Ext(name)), "{action: DENY, rules: [{from: [{source: {namespaces: [x]}}]}]}")), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		castellanRun(t, "authz", "validate", "-f", dir).want(t, 0, "a.yaml:2", "b.yml:2")
	})
	t.Run("mesh settings count", func(t *testing.T) {
		p := writeFile(t, "p.yaml", []byte(policyOf("p", "{action: CUSTOM, provider: {name: ext}, rules: [{}]}")))
		mesh := writeFile(t, "mesh.yaml", []byte("extensionProviders: [{name: ext, address: 'ext.example:9000'}]"))
		with := castellanRun(t, "authz", "validate", "-f", p, "--mesh", mesh).want(t, 0)
		without := castellanRun(t, "authz", "validate", "-f", p)
		if with.out == without.out {
			t.Errorf("the provider makes no difference:\n%s", with.out)
		}
	})
	t.Run("nothing to validate is a mistake", func(t *testing.T) {
		castellanRun(t, "authz", "validate").want(t, 3, "-f is required: a file or directory of policies")
		castellanRun(t, "authz", "validate", "-f", t.TempDir()).want(t, 3, "no policy there; files end in .yaml, .yml or .json")
		castellanRun(t, "authz", "validate", "-f", writeFile(t, "e.yaml", nil)).want(t, 3, "holds no policy")
		castellanRun(t, "authz", "validate", "-f", "/nothing").want(t, 3, "there is no such file or directory")
		castellanRun(t, "authz", "validate", good).want(t, 3, "give files with -f")
		castellanRun(t, "authz", "validate", "-f", good, "-o", "pem").want(t, 3, `-o "pem"`)
	})
}
