package cli

import (
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"

	"castellan.dev/api/policy"
	"castellan.dev/authz"
	"castellan.dev/discovery"
)

func (e *env) authzCommand() *cobra.Command {
	return group("authz", "Validate policies and explain decisions", e.canICommand(), e.validateCommand())
}

// documentView is one document and what is to be said of it.
type documentView struct {
	File      string          `json:"file"`
	Line      int             `json:"line"`
	Kind      string          `json:"kind,omitempty"`
	Namespace string          `json:"namespace,omitempty"`
	Name      string          `json:"name,omitempty"`
	Valid     bool            `json:"valid"`
	Findings  []authz.Finding `json:"findings"`
}

func (e *env) validateCommand() *cobra.Command {
	var files []string
	var meshFile string
	cmd := &cobra.Command{
		Use:   "validate -f FILE_OR_DIR…",
		Short: "Check policies as the server does before it admits them",
		Long:  "Exit code 0 when every document is valid (warnings are allowed), 3 otherwise.",
		Args:  cobra.NoArgs,
	}
	cmd.Flags().StringArrayVarP(&files, "filename", "f", nil, "file or directory of policies, - for standard input (repeats)")
	cmd.Flags().StringVar(&meshFile, "mesh", "", "mesh settings: YAML with the keys of `mesh:` at top level")
	formats := []string{"table", "json", "yaml"}
	format := outputFlag(cmd, formats...)
	cmd.RunE = func(*cobra.Command, []string) error {
		if err := checkOutput(*format, formats...); err != nil {
			return err
		}
		if len(files) == 0 {
			return invalidf("-f is required: a file or directory of policies")
		}
		mesh, err := loadMesh(meshFile, "")
		if err != nil {
			return err
		}
		docs, err := e.readPolicies(files, mesh)
		if err != nil {
			return err
		}
		if err := e.printDocuments(docs, *format); err != nil {
			return err
		}
		return refusal(docs)
	}
	return cmd
}

// loadMesh reads mesh settings and fills the defaults the server fills.
func loadMesh(path, trustDomain string) (policy.Mesh, error) {
	mesh := policy.Mesh{TrustDomain: trustDomain}
	if path != "" {
		data, err := os.ReadFile(path)
		if err != nil {
			return mesh, err
		}
		if err := yaml.UnmarshalStrict(data, &mesh, yaml.DisallowUnknownFields); err != nil {
			return mesh, invalidf("--mesh %s: %w", path, err)
		}
	}
	if mesh.TrustDomain == "" {
		mesh.TrustDomain = "cluster.local"
	}
	if mesh.RootNamespace == "" {
		mesh.RootNamespace = "castellan-system"
	}
	if mesh.PathNormalization == "" {
		mesh.PathNormalization = policy.NormalizeBase
	}
	return mesh, nil
}

// readPolicies reads and validates every document of the given files and directories.
func (e *env) readPolicies(paths []string, mesh policy.Mesh) ([]discovery.FileDocument, error) {
	var docs []discovery.FileDocument
	for _, p := range paths {
		path := p
		if p == "-" {
			f, err := os.CreateTemp("", "castellan-*.yaml")
			if err != nil {
				return nil, err
			}
			defer os.Remove(f.Name())
			_, err = io.Copy(f, io.LimitReader(e.in, maxCertFile))
			f.Close()
			if err != nil {
				return nil, err
			}
			path = f.Name()
		}
		got, err := discovery.ReadDocuments(path)
		if err != nil {
			return nil, err
		}
		if len(got) == 0 {
			return nil, invalidf("%s holds no policy (files end in .yaml, .yml or .json)", p)
		}
		for i := range got {
			if p == "-" {
				got[i].File = "standard input"
			}
		}
		docs = append(docs, got...)
	}
	return discovery.Admit(docs, mesh), nil
}

// refusal is the error for documents of which some are refused.
func refusal(docs []discovery.FileDocument) error {
	n := 0
	for _, d := range docs {
		if d.Refused() {
			n++
		}
	}
	if n == 0 {
		return nil
	}
	return invalidf("%d of %d documents are invalid", n, len(docs))
}

func (e *env) printDocuments(docs []discovery.FileDocument, format string) error {
	views := make([]documentView, 0, len(docs))
	for _, d := range docs {
		v := documentView{
			File: d.File, Line: d.Line, Kind: d.Document.Kind, Namespace: d.Document.Metadata.Namespace, Name: d.Document.Metadata.Name,
			Valid: !d.Refused(), Findings: d.Findings,
		}
		if v.Findings == nil {
			v.Findings = []authz.Finding{}
		}
		views = append(views, v)
	}
	if format != "table" {
		return writeData(e.out, format, views)
	}
	return printDocumentTable(e.out, views)
}

func printDocumentTable(w io.Writer, views []documentView) error {
	for _, v := range views {
		verdict := "valid"
		if !v.Valid {
			verdict = "INVALID"
		}
		name := fmt.Sprintf("%s %s/%s", v.Kind, v.Namespace, v.Name)
		if v.Name == "" {
			name = "document"
		}
		if _, err := fmt.Fprintf(w, "%s:%d: %s: %s\n", v.File, v.Line, name, verdict); err != nil {
			return err
		}
		for _, f := range v.Findings {
			if _, err := fmt.Fprintf(w, "    %s\n", f); err != nil {
				return err
			}
		}
	}
	return nil
}
