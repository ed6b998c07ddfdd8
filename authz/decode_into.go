package authz

import (
	"reflect"
	"slices"
	"strconv"
	"strings"
)

// decodeInto fills a struct of api/policy from JSON by its tags, names compared
// exactly. Numbers and booleans are never taken for strings, nor the reverse:
// where Istio's objects disagree with their schema the API server refuses them.
func decodeInto(field string, n *jsonNode, into reflect.Value) error {
	switch into.Kind() {
	case reflect.Pointer:
		into.Set(reflect.New(into.Type().Elem()))
		return decodeInto(field, n, into.Elem())
	case reflect.Struct:
		return decodeStruct(field, n, into)
	case reflect.Slice:
		return decodeList(field, n, into)
	case reflect.Map:
		return decodeMap(field, n, into)
	case reflect.Int64:
		return decodeInt(field, n, into)
	case reflect.Bool:
		if err := n.want(field, jsonBool); err != nil {
			return err
		}
		into.SetBool(n.text == "true")
		return nil
	default:
		return decodeString(field, n, into)
	}
}

func decodeString(field string, n *jsonNode, into reflect.Value) error {
	if err := n.want(field, jsonString); err != nil {
		return err
	}
	// encoding/json writes U+FFFD for a lone surrogate; whatever the author
	// meant, it was not that.
	if strings.ContainsRune(n.text, '\uFFFD') {
		return &FieldError{Field: field, Value: shorten(n.text), Reason: "holds U+FFFD, the mark of broken text"}
	}
	into.SetString(n.text)
	return nil
}

func decodeInt(field string, n *jsonNode, into reflect.Value) error {
	if err := n.want(field, jsonNumber); err != nil {
		return err
	}
	i, err := strconv.ParseInt(n.text, 10, 64)
	if err != nil {
		return &FieldError{Field: field, Value: shorten(n.text), Reason: "not a whole number of 64 bits"}
	}
	into.SetInt(i)
	return nil
}

func decodeStruct(field string, n *jsonNode, into reflect.Value) error {
	if err := n.want(field, jsonObject); err != nil {
		return err
	}
	names := fieldNames(into.Type())
	given := make(map[int]bool)
	for _, m := range n.members {
		child := childPath(field, m.name)
		i := slices.Index(names, canonicalName(m.name))
		if i < 0 {
			return &FieldError{Field: child, Reason: "unknown field", Allowed: names}
		}
		if m.value.kind == jsonNull {
			continue
		}
		if given[i] {
			return &FieldError{Field: child, Reason: "given twice, under two spellings; keep one"}
		}
		given[i] = true
		if err := decodeInto(child, m.value, into.Field(i)); err != nil {
			return err
		}
	}
	return nil
}

// canonicalName knows the one alternative spelling that the field's CRDs have.
func canonicalName(name string) string {
	if name == "jwks_uri" {
		return "jwksUri"
	}
	return name
}

func fieldNames(t reflect.Type) []string {
	names := make([]string, t.NumField())
	for i := range names {
		names[i], _, _ = strings.Cut(t.Field(i).Tag.Get("json"), ",")
	}
	return names
}

// decodeList keeps an empty list apart from an absent one: Validate refuses
// some of the former.
func decodeList(field string, n *jsonNode, into reflect.Value) error {
	if err := n.want(field, jsonArray); err != nil {
		return err
	}
	list := reflect.MakeSlice(into.Type(), len(n.items), len(n.items))
	for i, item := range n.items {
		child := itemPath(field, i)
		if item.kind == jsonNull {
			return &FieldError{Field: child, Reason: "null is not allowed within a list; remove it"}
		}
		if err := decodeInto(child, item, list.Index(i)); err != nil {
			return err
		}
	}
	into.Set(list)
	return nil
}

func decodeMap(field string, n *jsonNode, into reflect.Value) error {
	if err := n.want(field, jsonObject); err != nil {
		return err
	}
	m := reflect.MakeMapWithSize(into.Type(), len(n.members))
	for _, member := range n.members {
		child := childPath(field, member.name)
		if member.value.kind == jsonNull {
			return &FieldError{Field: child, Reason: "null is not allowed within a map; remove it"}
		}
		value := reflect.New(into.Type().Elem()).Elem()
		if err := decodeInto(child, member.value, value); err != nil {
			return err
		}
		m.SetMapIndex(reflect.ValueOf(member.name), value)
	}
	into.Set(m)
	return nil
}
