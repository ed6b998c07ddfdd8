package authz

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"
)

// maxDepth bounds nesting. Specs need 8 levels; managedFields of a real object go
// to about 20.
const maxDepth = 64

// longestPath is up to what length paths are continued; no field of a policy has a
// longer one. A path is made for every value, and below long names of an object
// that only pretends to be a policy that would be gigabytes.
const longestPath = 256

type jsonKind string

const (
	jsonNull   jsonKind = "null"
	jsonBool   jsonKind = "a boolean"
	jsonNumber jsonKind = "a number"
	jsonString jsonKind = "a string"
	jsonArray  jsonKind = "a list"
	jsonObject jsonKind = "an object"
)

// jsonNode is a value with its members in order: encoding/json alone would take
// the last of two equal keys and match names without regard to case, and both
// are ways to hide one policy inside another.
type jsonNode struct {
	kind    jsonKind
	text    string // strings as they are, numbers and booleans as written
	members []jsonMember
	items   []*jsonNode
}

type jsonMember struct {
	name  string
	value *jsonNode
}

func (n *jsonNode) member(name string) *jsonNode {
	for _, m := range n.members {
		if m.name == name && m.value.kind != jsonNull {
			return m.value
		}
	}
	return nil
}

// want reports a value of another type than the one given.
func (n *jsonNode) want(field string, kind jsonKind) error {
	if n.kind == kind {
		return nil
	}
	return &FieldError{Field: field, Value: n.sample(), Reason: fmt.Sprintf("%s is wanted, not %s", kind, n.kind)}
}

// sample is what of a value of the wrong type is shown.
func (n *jsonNode) sample() string {
	switch n.kind {
	case jsonString, jsonNumber, jsonBool:
		return shorten(n.text)
	default:
		return ""
	}
}

func parseJSON(object []byte) (*jsonNode, error) {
	switch {
	case len(object) > maxObject:
		return nil, &FieldError{Reason: fmt.Sprintf("object of %d bytes is larger than %d", len(object), maxObject)}
	case !utf8.Valid(object):
		return nil, &FieldError{Reason: "object is not UTF-8"}
	}
	// Syntax is settled first, so that the walk below meets no errors but its own.
	var syntax json.RawMessage
	if err := json.Unmarshal(object, &syntax); err != nil {
		return nil, &FieldError{Reason: "object is not JSON: " + err.Error()}
	}
	dec := json.NewDecoder(bytes.NewReader(object))
	dec.UseNumber()
	return parseValue(dec, "", 0)
}

func parseValue(dec *json.Decoder, field string, depth int) (*jsonNode, error) {
	if depth > maxDepth {
		return nil, &FieldError{Field: field, Reason: fmt.Sprintf("nested more than %d levels deep", maxDepth)}
	}
	token, err := dec.Token()
	if err != nil {
		return nil, &FieldError{Field: field, Reason: "object is not JSON: " + err.Error()}
	}
	switch t := token.(type) {
	case nil:
		return &jsonNode{kind: jsonNull}, nil
	case bool:
		return &jsonNode{kind: jsonBool, text: strconv.FormatBool(t)}, nil
	case json.Number:
		return &jsonNode{kind: jsonNumber, text: t.String()}, nil
	case string:
		return &jsonNode{kind: jsonString, text: t}, nil
	case json.Delim:
		if t == '[' {
			return parseArray(dec, field, depth)
		}
		return parseObject(dec, field, depth)
	default:
		return nil, &FieldError{Field: field, Reason: fmt.Sprintf("unexpected token %v", token)}
	}
}

func parseArray(dec *json.Decoder, field string, depth int) (*jsonNode, error) {
	n := &jsonNode{kind: jsonArray}
	for dec.More() {
		item, err := parseValue(dec, itemPath(field, len(n.items)), depth+1)
		if err != nil {
			return nil, err
		}
		n.items = append(n.items, item)
	}
	return n, closeDelim(dec, field)
}

func parseObject(dec *json.Decoder, field string, depth int) (*jsonNode, error) {
	n := &jsonNode{kind: jsonObject}
	seen := make(map[string]bool)
	for dec.More() {
		token, err := dec.Token()
		name, ok := token.(string)
		if err != nil || !ok {
			return nil, &FieldError{Field: field, Reason: "object is not JSON: a key is wanted"}
		}
		child := childPath(field, name)
		if seen[name] {
			return nil, &FieldError{Field: child, Reason: "given twice; keep one"}
		}
		seen[name] = true
		value, err := parseValue(dec, child, depth+1)
		if err != nil {
			return nil, err
		}
		n.members = append(n.members, jsonMember{name: name, value: value})
	}
	return n, closeDelim(dec, field)
}

func closeDelim(dec *json.Decoder, field string) error {
	if _, err := dec.Token(); err != nil {
		return &FieldError{Field: field, Reason: "object is not JSON: " + err.Error()}
	}
	return nil
}

// childPath names a member: spec.rules, metadata.annotations["istio.io/dry-run"].
func childPath(parent, name string) string {
	switch {
	case len(parent) > longestPath:
		return parent
	case !plainName(name):
		return parent + "[" + strconv.Quote(shorten(name)) + "]"
	case parent == "":
		return name
	default:
		return parent + "." + name
	}
}

func itemPath(parent string, i int) string {
	if len(parent) > longestPath {
		return parent
	}
	return parent + "[" + strconv.Itoa(i) + "]"
}

func plainName(name string) bool {
	return name != "" && len(name) <= 64 && strings.Trim(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_") == ""
}
