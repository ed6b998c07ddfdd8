package authz

import (
	"fmt"
	"reflect"
	"strings"
	"time"

	"castellan.dev/api/policy"
)

// maxObject bounds what Decode reads; it is what the API server takes for one
// object, with room.
const maxObject = 1 << 20

// FieldError says which field of a document was refused, and why.
type FieldError struct {
	// Field is the path of the field, as in "spec.rules[0].to[1].operation.paths[0]".
	// It is empty where the object as a whole is meant.
	Field string
	// Value is what stood there, shortened; empty where the field as a whole is meant.
	Value string
	// Reason says what is wrong.
	Reason string
	// Allowed lists what would do, where there are few.
	Allowed []string
}

// Error returns one line with all of it.
func (e *FieldError) Error() string {
	var b strings.Builder
	b.WriteString("authz: ")
	if e.Field != "" {
		b.WriteString(e.Field + ": ")
	}
	if e.Value != "" {
		fmt.Fprintf(&b, "%q: ", e.Value)
	}
	b.WriteString(e.Reason)
	if len(e.Allowed) > 0 {
		b.WriteString(" (allowed: " + strings.Join(e.Allowed, ", ") + ")")
	}
	return b.String()
}

// Decode reads one Kubernetes object given as JSON: an AuthorizationPolicy,
// RequestAuthentication or PeerAuthentication of security.istio.io, v1 or v1beta1.
//
// It is strict where meaning hangs on it: fields of spec that are unknown, twice
// given or of the wrong type are refused, as are unknown top-level fields. It is
// tolerant of what only the API server writes: metadata may hold fields policy
// does not need, and status is ignored. A null field is an absent one, as
// protobuf's JSON has it; a null within a list or a map is refused, because to
// drop it could widen a rule. Whether the values make sense is Validate's
// question. Every error is a *FieldError.
func Decode(object []byte) (policy.Document, error) {
	root, err := parseJSON(object)
	if err != nil {
		return policy.Document{}, err
	}
	doc, err := decodeObject(root)
	if err != nil {
		// Nothing half-read gets out.
		return policy.Document{}, err
	}
	return doc, nil
}

func decodeObject(root *jsonNode) (policy.Document, error) {
	var doc policy.Document
	if err := root.want("", jsonObject); err != nil {
		return doc, err
	}
	var spec *jsonNode
	for _, m := range root.members {
		var err error
		switch m.name {
		case "apiVersion":
			err = decodeEnum(m, policy.Group+"/v1", policy.Group+"/v1beta1")
		case "kind":
			doc.Kind = m.value.text
			err = decodeEnum(m, policy.KindAuthorization, policy.KindRequestAuthentication, policy.KindPeerAuthentication)
		case "metadata":
			err = decodeMetadata(m.value, &doc.Metadata)
		case "spec":
			spec = m.value
		case "status":
		default:
			err = &FieldError{Field: m.name, Reason: "unknown field", Allowed: []string{"apiVersion", "kind", "metadata", "spec"}}
		}
		if err != nil {
			return doc, err
		}
	}
	for _, name := range []string{"apiVersion", "kind", "metadata"} {
		if m := root.member(name); m == nil {
			return doc, &FieldError{Field: name, Reason: "required"}
		}
	}
	return doc, decodeSpec(spec, &doc)
}

// decodeSpec fills the spec that the kind calls for. An absent spec is an empty
// one: of an AuthorizationPolicy that denies everything, which is the safe side.
func decodeSpec(spec *jsonNode, doc *policy.Document) error {
	var into any
	switch doc.Kind {
	case policy.KindAuthorization:
		doc.Authorization = new(policy.AuthorizationPolicy)
		into = doc.Authorization
	case policy.KindRequestAuthentication:
		doc.RequestAuthentication = new(policy.RequestAuthentication)
		into = doc.RequestAuthentication
	default:
		doc.PeerAuthentication = new(policy.PeerAuthentication)
		into = doc.PeerAuthentication
	}
	if spec == nil || spec.kind == jsonNull {
		return nil
	}
	return decodeInto("spec", spec, reflect.ValueOf(into).Elem())
}

func decodeEnum(m jsonMember, allowed ...string) error {
	if err := m.value.want(m.name, jsonString); err != nil {
		return err
	}
	for _, a := range allowed {
		if m.value.text == a {
			return nil
		}
	}
	return &FieldError{Field: m.name, Value: shorten(m.value.text), Reason: "not served", Allowed: allowed}
}

// decodeMetadata reads what policy depends on and passes over the rest.
func decodeMetadata(n *jsonNode, meta *policy.Metadata) error {
	if err := n.want("metadata", jsonObject); err != nil {
		return err
	}
	for _, m := range n.members {
		if m.value.kind == jsonNull {
			continue
		}
		field := childPath("metadata", m.name)
		var err error
		switch m.name {
		case "name":
			err = decodeInto(field, m.value, reflect.ValueOf(&meta.Name).Elem())
		case "namespace":
			err = decodeInto(field, m.value, reflect.ValueOf(&meta.Namespace).Elem())
		case "uid":
			err = decodeInto(field, m.value, reflect.ValueOf(&meta.UID).Elem())
		case "labels":
			err = decodeInto(field, m.value, reflect.ValueOf(&meta.Labels).Elem())
		case "annotations":
			err = decodeInto(field, m.value, reflect.ValueOf(&meta.Annotations).Elem())
		case "generation":
			err = decodeInto(field, m.value, reflect.ValueOf(&meta.Generation).Elem())
		case "creationTimestamp":
			meta.CreationTimestamp, err = decodeTime(field, m.value)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func decodeTime(field string, n *jsonNode) (time.Time, error) {
	if err := n.want(field, jsonString); err != nil {
		return time.Time{}, err
	}
	t, err := time.Parse(time.RFC3339, n.text)
	if err != nil {
		return time.Time{}, &FieldError{Field: field, Value: shorten(n.text), Reason: "not an RFC 3339 time"}
	}
	return t, nil
}

// shorten bounds what of a refused value is repeated in errors.
func shorten(s string) string {
	const most = 120
	if len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:most], "") + "…"
}
