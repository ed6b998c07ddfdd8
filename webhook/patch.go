package webhook

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
)

// operation is one of a patch (RFC 6902).
type operation struct {
	Op    string `json:"op"`
	Path  string `json:"path"`
	Value any    `json:"value,omitempty"`
}

// Patch returns the JSON patch from before to after; nil where nothing changed.
//
// Each field is patched by itself, and items of a list are added beside those that
// stand: a field of the API server's that our types do not know is never written
// back without itself.
func Patch(before, after *corev1.Pod) ([]byte, error) {
	from, err := tree(before)
	if err != nil {
		return nil, err
	}
	to, err := tree(after)
	if err != nil {
		return nil, err
	}
	ops := diff(nil, "", from, to)
	if len(ops) == 0 {
		return nil, nil
	}
	return json.Marshal(ops)
}

// tree is a value as JSON has it.
func tree(v any) (any, error) {
	data, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("webhook: %w", err)
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.UseNumber()
	var out any
	if err := dec.Decode(&out); err != nil {
		return nil, fmt.Errorf("webhook: %w", err)
	}
	return out, nil
}

func diff(ops []operation, path string, from, to any) []operation {
	if reflect.DeepEqual(from, to) {
		return ops
	}
	switch a := from.(type) {
	case map[string]any:
		if b, ok := to.(map[string]any); ok {
			return diffObject(ops, path, a, b)
		}
	case []any:
		if b, ok := to.([]any); ok {
			return diffList(ops, path, a, b)
		}
	}
	return append(ops, operation{"replace", path, to})
}

func diffObject(ops []operation, path string, from, to map[string]any) []operation {
	for _, name := range slices.Sorted(maps.Keys(from)) {
		if value, ok := to[name]; ok {
			ops = diff(ops, path+"/"+escape(name), from[name], value)
		} else {
			ops = append(ops, operation{Op: "remove", Path: path + "/" + escape(name)})
		}
	}
	for _, name := range slices.Sorted(maps.Keys(to)) {
		if _, ok := from[name]; !ok {
			ops = append(ops, operation{"add", path + "/" + escape(name), to[name]})
		}
	}
	return ops
}

// diffList removes what is gone, from the end, and then adds what is new, from the
// start; items are known by their name or, where they have none, by their value.
// A list whose items changed their order, or cannot be told apart, is replaced.
func diffList(ops []operation, path string, from, to []any) []operation {
	fromKeys, toKeys := keys(from), keys(to)
	old, added := places(fromKeys), places(toKeys)
	if len(old) != len(from) || len(added) != len(to) || !inOrder(fromKeys, added) {
		return append(ops, operation{"replace", path, to})
	}
	for i, key := range slices.Backward(fromKeys) {
		if _, ok := added[key]; !ok {
			ops = append(ops, operation{Op: "remove", Path: path + "/" + strconv.Itoa(i)})
		}
	}
	for i, key := range toKeys {
		at := path + "/" + strconv.Itoa(i)
		if j, ok := old[key]; ok {
			ops = diff(ops, at, from[j], to[i])
		} else {
			ops = append(ops, operation{"add", at, to[i]})
		}
	}
	return ops
}

func keys(items []any) []string {
	out := make([]string, len(items))
	for i, item := range items {
		object, _ := item.(map[string]any)
		mount, isMount := object["mountPath"].(string)
		name, isNamed := object["name"].(string)
		switch {
		case isMount: // named by its volume, which may be mounted twice
			out[i] = "mount " + mount
		case isNamed:
			out[i] = "name " + name
		default:
			// It came from JSON.
			data, _ := json.Marshal(item)
			out[i] = "value " + string(data)
		}
	}
	return out
}

// places says where each key stands; a key that stands twice is counted once.
func places(keys []string) map[string]int {
	at := make(map[string]int, len(keys))
	for i, key := range keys {
		at[key] = i
	}
	return at
}

// inOrder reports whether those of the keys that have a place follow one another.
func inOrder(keys []string, at map[string]int) bool {
	last := -1
	for _, key := range keys {
		i, ok := at[key]
		if ok && i < last {
			return false
		}
		if ok {
			last = i
		}
	}
	return true
}

// escape writes a name as a part of a JSON pointer (RFC 6901).
func escape(name string) string {
	return strings.NewReplacer("~", "~0", "/", "~1").Replace(name)
}
