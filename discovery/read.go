package discovery

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"sigs.k8s.io/yaml"

	"castellan.dev/authz"
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
	names, err := policyFiles(path)
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

// policyFiles lists the names in dir that count, sorted. Hidden ones do not: they
// are editors' and, in a mounted ConfigMap, the folders behind the links.
func policyFiles(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		name := e.Name()
		if strings.HasPrefix(name, ".") || e.IsDir() {
			continue
		}
		switch filepath.Ext(name) {
		case ".yaml", ".yml", ".json":
			names = append(names, name)
		}
	}
	if len(names) > maxFiles {
		return nil, fmt.Errorf("%s holds %d policy files, %d are allowed", dir, len(names), maxFiles)
	}
	slices.Sort(names)
	return names, nil
}

// readFile reads a regular file, and never waits for a pipe's other end.
func readFile(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil {
		return nil, err
	} else if !info.Mode().IsRegular() {
		return nil, errors.New("not a regular file")
	}
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxFile {
		return nil, fmt.Errorf("larger than %d bytes", maxFile)
	}
	return data, nil
}

// unreadable stands for whatever a file may hold.
func unreadable(file string, err error) FileDocument {
	var path *fs.PathError
	if errors.As(err, &path) {
		err = path.Err // the file is named beside
	}
	return FileDocument{File: file, Findings: []authz.Finding{{Severity: authz.SeverityError, Reason: "cannot be read: " + err.Error()}}}
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
				Severity: authz.SeverityError, Reason: "not YAML: " + p.explain(err)}}})
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
		d.Findings = []authz.Finding{findingOf(err)}
		return d
	}
	d.Document = doc
	d.Ref = Ref{Kind: doc.Kind, Namespace: doc.Metadata.Namespace, Name: doc.Metadata.Name}
	return d
}

func findingOf(err error) authz.Finding {
	var field *authz.FieldError
	if !errors.As(err, &field) {
		return authz.Finding{Severity: authz.SeverityError, Reason: err.Error()}
	}
	reason := field.Reason
	if len(field.Allowed) > 0 {
		reason += "; allowed: " + strings.Join(field.Allowed, ", ")
	}
	return authz.Finding{Severity: authz.SeverityError, Field: field.Field, Value: field.Value, Reason: reason}
}

// listItems unfolds what kubectl prints for several objects.
func listItems(object []byte) [][]byte {
	top := members(object)
	if text(top["kind"]) != "List" || text(top["apiVersion"]) != "v1" {
		return [][]byte{object}
	}
	var items []json.RawMessage
	if json.Unmarshal(top["items"], &items) != nil {
		return [][]byte{object}
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
