package discovery

import (
	"castellan.dev/api/policy"
	"castellan.dev/authz"
)

// FileDocument is one document of a file.
type FileDocument struct {
	File string
	// Line is where the document begins, from 1.
	Line int
	// JSON is the object; nil where the file or this part of it is no YAML.
	JSON []byte
	// Document is what JSON decodes to; its zero value where that failed.
	Document policy.Document
	// Findings of reading and, after Admit, of validation.
	Findings []authz.Finding
}

// Refused reports whether any finding is an error.
func (d FileDocument) Refused() bool {
	for _, f := range d.Findings {
		if f.Severity == authz.SeverityError {
			return true
		}
	}
	return false
}

// ReadDocuments reads a file, or every *.yaml, *.yml and *.json file of a
// directory (not of those below), in the order of their names. What is wrong with
// a document or a file is among the findings; the error is for a path that cannot
// be read at all.
func ReadDocuments(path string) ([]FileDocument, error) { return nil, nil }

// Admit adds what is wrong with the documents under the given mesh settings, each
// and together (the same name twice). The server admits exactly the documents that
// are then without errors.
func Admit(docs []FileDocument, mesh policy.Mesh) []FileDocument { return docs }
