package cli

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/spf13/cobra"

	"castellan.dev/api/policy"
	"castellan.dev/authz"
	"castellan.dev/discovery"
	"castellan.dev/internal/config"
)

func (e *env) authzCommand() *cobra.Command {
	return group("authz", "Validate policies and explain decisions", e.canICommand(), e.authzCheckCommand(), e.validateCommand())
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
	}
	cmd.Flags().StringArrayVarP(&files, "filename", "f", nil, "file or directory of policies, - for standard input (repeats)")
	cmd.Flags().StringVar(&meshFile, "mesh", "", "`FILE` with mesh settings: YAML, the keys of the server's mesh section at top level")
	formats := []string{"table", "json", "yaml"}
	format := outputFlag(cmd, formats...)
	cmd.RunE = func(_ *cobra.Command, args []string) error {
		if err := checkOutput(*format, formats...); err != nil {
			return err
		}
		// What a shell makes of `-f *.yaml`.
		if len(args) > 0 && len(files) == 0 {
			return invalidf("give files with -f")
		}
		files = append(files, args...)
		if len(files) == 0 {
			return invalidf("-f is required: a file or directory of policies, or - for standard input")
		}
		mesh, err := loadMesh(meshFile, "")
		if err != nil {
			return err
		}
		docs, err := e.readPolicies(files, mesh)
		if err != nil {
			return err
		}
		if len(docs) == 0 {
			return invalidf("-f: no policy there; files end in .yaml, .yml or .json, and directories below are not read")
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
		data, err := readNamedFile("--mesh", path)
		if err != nil {
			return mesh, err
		}
		if err := config.Unmarshal(data, &mesh); err != nil {
			return mesh, invalidf("--mesh %s: %w; the keys of `mesh:` stand at top level", path, err)
		}
	}
	if err := config.CheckMesh(&mesh); err != nil {
		return mesh, invalidf("--mesh %s: %w", path, err)
	}
	return mesh, nil
}

// readPolicies reads and validates every document of the given files and
// directories. A directory may be empty, as a mesh may be without policy; a file
// that is named and holds none is a mistake.
func (e *env) readPolicies(paths []string, mesh policy.Mesh) ([]discovery.FileDocument, error) {
	var docs []discovery.FileDocument
	seen := map[string]bool{}
	for _, path := range paths {
		got, err := e.readPath(path)
		if err != nil {
			return nil, err
		}
		if info, err := os.Stat(path); len(got) == 0 && (err != nil || !info.IsDir()) {
			return nil, invalidf("-f %s holds no policy", path)
		}
		for _, d := range got {
			// A file that is named itself and by its directory is read once.
			file, err := absolute(d.File)
			if err != nil {
				return nil, err
			}
			at := fmt.Sprintf("%s:%d", file, d.Line)
			if !seen[at] {
				docs = append(docs, d)
			}
			seen[at] = true
		}
	}
	return discovery.Admit(docs, mesh), nil
}

func (e *env) readPath(path string) ([]discovery.FileDocument, error) {
	if path != "-" {
		got, err := discovery.ReadDocuments(path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, invalidf("-f %s: there is no such file or directory", path)
		}
		return got, err
	}
	data, err := readBounded(e.in, "standard input")
	if err != nil {
		return nil, err
	}
	// Read from a file as any other, so that it is judged as any other.
	f, err := os.CreateTemp("", "castellan-*.yaml")
	if err != nil {
		return nil, err
	}
	defer os.Remove(f.Name())
	_, werr := f.Write(data)
	if err := errors.Join(werr, f.Close()); err != nil {
		return nil, err
	}
	got, err := discovery.ReadDocuments(f.Name())
	for i := range got {
		got[i].File = "standard input"
	}
	return got, err
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
			File: d.File, Line: d.Line, Kind: d.Ref.Kind, Namespace: d.Ref.Namespace, Name: d.Ref.Name,
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
		name := visible(fmt.Sprintf("%s %s/%s", v.Kind, v.Namespace, v.Name))
		if v.Name == "" {
			name = "document"
		}
		if _, err := fmt.Fprintf(w, "%s:%d: %s: %s\n", visible(v.File), v.Line, name, verdict); err != nil {
			return err
		}
		for _, f := range v.Findings {
			if _, err := fmt.Fprintf(w, "    %s\n", visible(f.String())); err != nil {
				return err
			}
		}
	}
	return nil
}
