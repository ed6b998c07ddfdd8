package discovery

import (
	"fmt"

	"castellan.dev/api/policy"
	"castellan.dev/authz"
)

// Ref names a document; two documents of one Ref cannot both stand.
type Ref struct{ Kind, Namespace, Name string }

// complete reports whether the document can be told apart from every other.
func (r Ref) complete() bool { return r.Kind != "" && r.Namespace != "" && r.Name != "" }

func (r Ref) String() string { return r.Kind + " " + r.Namespace + "/" + r.Name }

// FileDocument is one document of a file, or one object of an API server.
type FileDocument struct {
	// File is empty for an object.
	File string
	// Line is where the document begins, from 1.
	Line int
	// JSON is the object; nil where the file or this part of it is no YAML.
	JSON []byte
	// Document is what JSON decodes to; its zero value where that failed.
	Document policy.Document
	// Findings of reading and, after Admit, of validation.
	Findings []authz.Finding
	// Ref is what the document calls itself, as far as it can be told even where it
	// is refused.
	Ref Ref
	// UID and Generation are an object's; a file's documents have none.
	UID        string
	Generation int64

	// scope is whom it could select, for when it is refused.
	scope scope
	// notice: nothing but findings, and about no document.
	notice bool
	// kept, of a notice: what the file held before stays in force.
	kept bool
	// foreign: an object of another API, which can have been no policy.
	foreign bool
	// src is the file's whole text, where nothing of it is refused.
	src *source
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

// Place is where the document stands, for people.
func (d FileDocument) Place() string {
	if d.File == "" {
		return d.Ref.String()
	}
	if d.Line == 0 {
		return d.File
	}
	return fmt.Sprintf("%s:%d", d.File, d.Line)
}

// firstError is the finding that a refusal is explained by.
func (d FileDocument) firstError() authz.Finding {
	for _, f := range d.Findings {
		if f.Severity == authz.SeverityError {
			return f
		}
	}
	return authz.Finding{}
}

// Admit adds what is wrong with the documents under the given mesh settings, each
// and together (the same name twice). The server admits exactly the documents that
// are then without errors.
func Admit(docs []FileDocument, mesh policy.Mesh) []FileDocument {
	out := make([]FileDocument, len(docs))
	for i, d := range docs {
		if !d.Refused() && !d.notice {
			d = d.with(authz.Validate(d.Document, mesh)...)
		}
		out[i] = d
	}
	refuseDuplicates(out)
	return out
}

// with returns the document with more findings.
func (d FileDocument) with(more ...authz.Finding) FileDocument {
	d.Findings = append(append([]authz.Finding(nil), d.Findings...), more...)
	return d
}

// refuseDuplicates refuses every document whose name stands more than once:
// nobody can say which was meant, so neither counts and the last good stays.
func refuseDuplicates(docs []FileDocument) {
	places := map[Ref][]int{}
	for i, d := range docs {
		if d.Ref.complete() {
			places[d.Ref] = append(places[d.Ref], i)
		}
	}
	for ref, at := range places {
		for i, n := range at {
			if len(at) < 2 {
				break
			}
			other := docs[at[(i+1)%len(at)]]
			docs[n] = docs[n].with(authz.Finding{
				Severity: authz.SeverityError, Field: "metadata.name", Value: ref.Namespace + "/" + ref.Name,
				Reason: fmt.Sprintf("another %s of this name stands at %s; neither counts until one is removed or renamed", ref.Kind, other.Place()),
			})
		}
	}
}
