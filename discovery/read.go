package discovery

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"sigs.k8s.io/yaml"

	"castellan.dev/authz"
)

// What findings name where there is no field to name.
const (
	wholeDirectory = "directory"
	wholeFile      = "file"
	wholeDocument  = "document"
)

const (
	maxFile      = 4 << 20
	maxFiles     = 5000
	maxDocuments = 10_000
)

// ReadDocuments reads a file, or every *.yaml, *.yml and *.json file of a
// directory (not of those below), in the order of their names. What is wrong with
// a document or a file is among the findings; the error is for a path that cannot
// be read at all.
func ReadDocuments(path string) ([]FileDocument, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("discovery: %w", err)
	}
	if !info.IsDir() {
		data, err := readFile(path)
		if err != nil {
			return nil, fmt.Errorf("discovery: %w", err)
		}
		return parseFile(path, data), nil
	}
	names, _, err := policyFiles(path)
	if err != nil {
		return nil, fmt.Errorf("discovery: %w", err)
	}
	var docs []FileDocument
	for _, name := range names {
		file := filepath.Join(path, name)
		data, err := readFile(file)
		if err != nil {
			docs = append(docs, unreadable(file, err))
			continue
		}
		docs = append(docs, parseFile(file, data)...)
	}
	if len(docs) > maxDocuments {
		return nil, fmt.Errorf("discovery: %s holds %d documents, %d are allowed", path, len(docs), maxDocuments)
	}
	return docs, nil
}

// policyFiles lists the names in dir that count, and the visible ones that do
// not, sorted. Hidden ones are editors' and, in a mounted ConfigMap, the folders
// behind the links.
func policyFiles(dir string) (names, others []string, err error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, nil, err
	}
	for _, e := range entries {
		name := e.Name()
		switch ext := filepath.Ext(name); {
		case strings.HasPrefix(name, "."):
		case !e.IsDir() && (ext == ".yaml" || ext == ".yml" || ext == ".json"):
			names = append(names, name)
		case strings.HasSuffix(name, "~"), strings.HasPrefix(name, "#"): // editors' as well
		default:
			others = append(others, name)
		}
	}
	if len(names) > maxFiles {
		return nil, nil, fmt.Errorf("%s holds %d policy files, %d are allowed", dir, len(names), maxFiles)
	}
	slices.Sort(names)
	slices.Sort(others)
	return names, others, nil
}

// unreadable stands for whatever a file may hold.
func unreadable(file string, err error) FileDocument {
	var path *fs.PathError
	if errors.As(err, &path) {
		err = path.Err // the file is named beside
	}
	return FileDocument{File: file, Findings: []authz.Finding{{Severity: authz.SeverityError, Field: wholeFile, Reason: "cannot be read: " + err.Error()}}}
}

// parseFile reads every document of a file.
func parseFile(file string, data []byte) []FileDocument {
	var docs []FileDocument
	parts := split(data)
	if len(parts) > maxDocuments {
		return []FileDocument{unreadable(file, fmt.Errorf("more than %d documents", maxDocuments))}
	}
	for _, p := range parts {
		object, err := yaml.YAMLToJSONStrict(p.text)
		if err != nil {
			docs = append(docs, FileDocument{File: file, Line: p.line, Findings: []authz.Finding{{
				Severity: authz.SeverityError, Field: fmt.Sprintf("line %d", p.line), Reason: "not YAML: " + p.explain(err)}}})
			continue
		}
		if string(object) == "null" {
			continue // nothing but comments
		}
		for _, item := range listItems(object) {
			docs = append(docs, decode(file, p.line, item))
		}
	}
	return docs
}

func decode(file string, line int, object []byte) FileDocument {
	d := FileDocument{File: file, Line: line, JSON: object}
	d.Ref, d.scope = identify(object)
	doc, err := authz.Decode(object)
	if err != nil {
		d.Findings = []authz.Finding{findingOf(err, object)}
		if d.foreign = isForeign(object); d.foreign {
			d.Findings[0].Reason += "; it is no policy, selects no workload and changes nothing here"
		}
		return d
	}
	d.Document = doc
	d.Ref = Ref{Kind: doc.Kind, Namespace: doc.Metadata.Namespace, Name: doc.Metadata.Name}
	return d
}

func findingOf(err error, object []byte) authz.Finding {
	var field *authz.FieldError
	if !errors.As(err, &field) {
		return authz.Finding{Severity: authz.SeverityError, Field: wholeDocument, Reason: err.Error()}
	}
	f := authz.Finding{Severity: authz.SeverityError, Field: field.Field, Value: field.Value, Reason: field.Reason}
	if len(field.Allowed) > 0 {
		f.Reason += "; allowed: " + strings.Join(field.Allowed, ", ")
	}
	if f.Value == "" {
		f.Value = valueAt(object, f.Field)
	}
	if f.Field == "" {
		f.Field = wholeDocument
	}
	return f
}

// listItems unfolds what kubectl prints for several objects.
func listItems(object []byte) [][]byte {
	top := members(object)
	if text(top["kind"]) != "List" || text(top["apiVersion"]) != "v1" {
		return [][]byte{object}
	}
	var items []json.RawMessage
	if json.Unmarshal(top["items"], &items) != nil || len(items) == 0 {
		return [][]byte{object} // refused: a list cut short must not pass for nothing
	}
	out := make([][]byte, len(items))
	for i, item := range items {
		out[i] = item
	}
	return out
}

// part is one YAML document within a file.
type part struct {
	text []byte
	// from is the line that text begins on, line that of its first content.
	from, line int
}

// explain makes one line of a YAML error, with the file's line numbers.
func (p part) explain(err error) string {
	words := strings.Fields(strings.TrimPrefix(err.Error(), "yaml: "))
	words = words[:min(len(words), 40)] // it may list every line of the file
	for i, word := range words {
		digits := strings.TrimSuffix(word, ":")
		if n, err := strconv.Atoi(digits); err == nil && i > 0 && words[i-1] == "line" {
			words[i] = strconv.Itoa(n+p.from-1) + word[len(digits):]
		}
	}
	return strings.Join(words, " ")
}

// split cuts a file at its document markers ("---" and "..." at the start of a
// line). Left to the YAML reader, everything after the first document would be
// dropped without a word.
func split(data []byte) []part {
	data = bytes.TrimPrefix(data, []byte("\xef\xbb\xbf"))
	var parts []part
	current := part{from: 1}
	end := func(next int) {
		if current.line > 0 {
			parts = append(parts, current)
		}
		current = part{from: next}
	}
	line := 0
	for l := range bytes.Lines(data) {
		line++
		trimmed := bytes.TrimRight(l, " \t\r\n")
		if rest, ok := marker(trimmed); ok {
			end(line)
			// What stands beside the marker belongs to the document.
			l = append([]byte("   "), rest...)
			l = append(l, '\n')
			trimmed = bytes.TrimSpace(rest)
		}
		if content := bytes.TrimSpace(trimmed); current.line == 0 && len(content) > 0 && content[0] != '#' {
			current.line = line
		}
		current.text = append(current.text, l...)
	}
	end(line + 1)
	return parts
}

func marker(line []byte) (rest []byte, ok bool) {
	for _, m := range []string{"---", "..."} {
		if rest, ok := bytes.CutPrefix(line, []byte(m)); ok && (len(rest) == 0 || rest[0] == ' ' || rest[0] == '\t') {
			return rest, true
		}
	}
	return nil, false
}
