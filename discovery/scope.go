package discovery

import (
	"encoding/json"
	"slices"
	"strconv"
	"strings"

	"castellan.dev/api/policy"
)

// defaultRootNamespace is where mesh-wide policies live unless the settings say otherwise.
const defaultRootNamespace = "castellan-system"

func rootNamespace(mesh policy.Mesh) string {
	if mesh.RootNamespace == "" {
		return defaultRootNamespace
	}
	return mesh.RootNamespace
}

// scope is the workloads that a refused document could select, read as widely as
// it can be meant: what cannot be told widens it.
type scope struct {
	// namespace, or "" for any.
	namespace string
	// labels that the workload must have; none is any workload.
	labels map[string]string
}

// covers reports whether the workload is one of them.
func (s scope) covers(namespace string, labels map[string]string, mesh policy.Mesh) bool {
	if s.namespace != "" && s.namespace != namespace && s.namespace != rootNamespace(mesh) {
		return false
	}
	for k, v := range s.labels {
		if have, ok := labels[k]; !ok || have != v {
			return false
		}
	}
	return true
}

// identify reads what an object calls itself and whom it could select, from JSON
// that need not be a policy at all.
func identify(object []byte) (Ref, scope) {
	var ref Ref
	var s scope
	top := members(object)
	ref.Kind = text(top["kind"])
	meta := members(top["metadata"])
	ref.Namespace, ref.Name = text(meta["namespace"]), text(meta["name"])
	s.namespace = ref.Namespace
	selector := members(members(top["spec"])["selector"])
	// A selector with anything unknown in it may have been meant otherwise.
	if raw, ok := selector["matchLabels"]; ok && len(selector) == 1 {
		var labels map[string]string
		if json.Unmarshal(raw, &labels) == nil {
			s.labels = labels
		}
	}
	return ref, s
}

func members(raw json.RawMessage) map[string]json.RawMessage {
	var m map[string]json.RawMessage
	if len(raw) == 0 || json.Unmarshal(raw, &m) != nil {
		return nil
	}
	return m
}

func text(raw json.RawMessage) string {
	var s string
	if len(raw) == 0 || json.Unmarshal(raw, &s) != nil {
		return ""
	}
	return s
}

// isForeign reports whether an object says clearly that it is of another API. One
// of our group, or of one of our kinds under whatever group, is policy gone wrong;
// so is what cannot be told.
func isForeign(object []byte) bool {
	top := members(object)
	group, version, grouped := strings.Cut(text(top["apiVersion"]), "/")
	if !grouped {
		group, version = "", group // the core group has no name
	}
	kind := text(top["kind"])
	readable := len(version) > 1 && version[0] == 'v' && version[1] >= '0' && version[1] <= '9' && kind != "" &&
		strings.Trim(group, "abcdefghijklmnopqrstuvwxyz0123456789.-") == "" && (group != "") == grouped
	if !readable || group == policy.Group || kind == "List" {
		return false
	}
	return !slices.ContainsFunc([]string{policy.KindAuthorization, policy.KindRequestAuthentication, policy.KindPeerAuthentication},
		func(ours string) bool { return strings.EqualFold(kind, ours) })
}

// maxShown bounds the values that findings repeat.
const maxShown = 128

// valueAt returns what stands at a path such as "spec.rules[0].to", as JSON, if it
// is small and can be found; a string without its quotes.
func valueAt(object []byte, path string) string {
	if path == "" {
		return ""
	}
	raw := json.RawMessage(object)
	for step := range strings.SplitSeq(path, ".") {
		name, indexes, _ := strings.Cut(step, "[")
		raw = members(raw)[name]
		for index := range strings.SplitSeq(strings.TrimSuffix(indexes, "]"), "][") {
			if index == "" {
				continue
			}
			var list []json.RawMessage
			i, err := strconv.Atoi(index)
			if err != nil || json.Unmarshal(raw, &list) != nil || i < 0 || i >= len(list) {
				return ""
			}
			raw = list[i]
		}
	}
	if len(raw) == 0 || len(raw) > maxShown {
		return ""
	}
	if s := text(raw); s != "" {
		return s
	}
	return string(raw)
}
