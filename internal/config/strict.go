package config

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"

	"sigs.k8s.io/yaml"
)

// Unmarshal reads one YAML document into a struct and refuses what would
// otherwise be passed over: unknown and duplicate fields, fields whose name
// differs in case only (encoding/json would take them, and of two such the last),
// and further documents.
func Unmarshal(data []byte, into any) error {
	if moreDocuments(data) {
		return errors.New("more than one YAML document; only the first would be read")
	}
	raw, err := yaml.YAMLToJSONStrict(data)
	if err != nil {
		return err
	}
	var tree any
	if err := json.Unmarshal(raw, &tree); err != nil {
		return err
	}
	if err := checkNames("", tree, reflect.TypeOf(into)); err != nil {
		return err
	}
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.DisallowUnknownFields()
	err = dec.Decode(into)
	var wrong *json.UnmarshalTypeError
	if errors.As(err, &wrong) {
		return fmt.Errorf("%s: %s given, want %s", wrong.Field, wrong.Value, kindName(wrong.Type))
	}
	return err
}

// kindName says what a field takes, in the words of YAML.
func kindName(t reflect.Type) string {
	switch t.Kind() {
	case reflect.Bool:
		return "true or false"
	case reflect.String:
		return "a string"
	case reflect.Slice:
		return "a list"
	case reflect.Struct, reflect.Map:
		return "a mapping"
	case reflect.Uint8, reflect.Uint16, reflect.Uint32:
		return fmt.Sprintf("a whole number from 0 to %d", uint64(1)<<t.Bits()-1)
	default:
		return "a whole number"
	}
}

// moreDocuments reports whether a document marker stands after content.
func moreDocuments(data []byte) bool {
	content := false
	for line := range bytes.Lines(data) {
		line = bytes.TrimRight(line, " \t\r\n")
		switch {
		case len(line) == 0 || line[0] == '#' || line[0] == '%':
		case bytes.Equal(line, []byte("---")) || bytes.HasPrefix(line, []byte("--- ")):
			if content {
				return true
			}
		case bytes.Equal(line, []byte("...")):
		default:
			content = true
		}
	}
	return false
}

// checkNames compares the member names of a decoded tree with the JSON names of
// the struct it goes into, exactly.
func checkNames(path string, tree any, t reflect.Type) error {
	for t != nil && t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if t == nil || reflect.PointerTo(t).Implements(reflect.TypeFor[json.Unmarshaler]()) {
		return nil
	}
	switch v := tree.(type) {
	case map[string]any:
		for _, name := range slices.Sorted(maps.Keys(v)) {
			value := v[name]
			at := strings.TrimPrefix(path+"."+name, ".")
			var child reflect.Type
			switch t.Kind() {
			case reflect.Struct:
				var ok bool
				if child, ok = fieldType(t, name); !ok {
					return fmt.Errorf("unknown field %q", at)
				}
			case reflect.Map:
				child = t.Elem()
			default: // a type error, which decoding reports
				return nil
			}
			if err := checkNames(at, value, child); err != nil {
				return err
			}
		}
	case []any:
		if t.Kind() != reflect.Slice {
			return nil
		}
		for i, value := range v {
			if err := checkNames(fmt.Sprintf("%s[%d]", path, i), value, t.Elem()); err != nil {
				return err
			}
		}
	}
	return nil
}

// fieldType finds a field by its JSON name; those of embedded structs count.
func fieldType(t reflect.Type, name string) (reflect.Type, bool) {
	for f := range t.Fields() {
		tag, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		if f.Anonymous && tag == "" {
			if found, ok := fieldType(f.Type, name); ok {
				return found, true
			}
			continue
		}
		if tag == "" {
			tag = f.Name
		}
		if f.IsExported() && tag == name && tag != "-" {
			return f.Type, true
		}
	}
	return nil, false
}
