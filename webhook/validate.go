package webhook

import (
	"bytes"
	"context"
	"encoding/json"
	"net/http"
	"reflect"
	"slices"

	admissionv1 "k8s.io/api/admission/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"castellan.dev/api/policy"
	"castellan.dev/authz"
	"castellan.dev/internal/workloads"
)

// Results of /validate beside the common ones and resultRefused.
const (
	resultAdmitted = "admitted"
	resultExempt   = "exempt" // nothing in it is new, or it is none of ours
)

// annotationDryRun is the one piece of metadata that policy depends on (rule 23).
const annotationDryRun = "istio.io/dry-run"

// validate answers a review of a policy. Only what is new is judged: an object that
// is bad already can be deleted, and can lose its finalizers.
func (s *Server) validate(ctx context.Context, req *admissionv1.AdmissionRequest) answer {
	if !judged(req) {
		return answer{resultExempt, allowed()}
	}
	doc, err := authz.Decode(req.Object.Raw)
	var findings []authz.Finding
	switch {
	case ctx.Err() != nil:
		// Fails closed: the caller has gone, and an answer all the same must not admit.
		return answer{resultLimited, denied(http.StatusServiceUnavailable, metav1.StatusReasonTimeout, "the review took too long")}
	case err != nil:
		findings = []authz.Finding{findingOf(err)}
	default:
		findings = Review(named(doc, req), s.cfg.Mesh, s.inventory())
	}
	message, warnings := split(findings)
	if message != "" {
		s.refused(ctx, "policy refused", req, message)
		response := denied(http.StatusUnprocessableEntity, metav1.StatusReasonInvalid, message)
		response.Warnings = warnings
		return answer{resultRefused, response}
	}
	return answer{resultAdmitted, allowed(warnings...)}
}

func (s *Server) inventory() *workloads.File {
	if s.cfg.Workloads == nil {
		return nil
	}
	return s.cfg.Workloads.Current()
}

// named completes what the API server fills in after it asks: a name that is yet
// to be generated. The namespace is the request's.
func named(doc policy.Document, req *admissionv1.AdmissionRequest) policy.Document {
	if req.Namespace != "" {
		doc.Metadata.Namespace = req.Namespace
	}
	if doc.Metadata.Name != "" {
		return doc
	}
	if doc.Metadata.Name = req.Name; doc.Metadata.Name == "" {
		var meta metav1.PartialObjectMetadata
		if json.Unmarshal(req.Object.Raw, &meta) == nil && meta.GenerateName != "" {
			doc.Metadata.Name = meta.GenerateName + "x"
		}
	}
	return doc
}

// judged says whether a request brings a policy that nobody has judged yet.
func judged(req *admissionv1.AdmissionRequest) bool {
	kinds := []string{policy.KindAuthorization, policy.KindRequestAuthentication, policy.KindPeerAuthentication}
	if req.Kind.Group != policy.Group || !slices.Contains(kinds, req.Kind.Kind) || req.SubResource != "" {
		return false
	}
	switch req.Operation {
	case admissionv1.Create:
		return true
	case admissionv1.Update:
		return !settled(req.OldObject.Raw, req.Object.Raw)
	default:
		return false
	}
}

// settled holds for an update that changes nothing that policy depends on. What
// cannot be read is not settled.
func settled(before, after []byte) bool {
	a, aok := essence(before)
	b, bok := essence(after)
	return aok && bok && a.dryRun == b.dryRun && reflect.DeepEqual(a.spec, b.spec)
}

type essential struct {
	spec   any
	dryRun string
}

// essence goes by exact names, as encoding/json's structs do not.
func essence(object []byte) (essential, bool) {
	dec := json.NewDecoder(bytes.NewReader(object))
	dec.UseNumber()
	var top map[string]any
	if dec.Decode(&top) != nil {
		return essential{}, false
	}
	meta, ok := top["metadata"].(map[string]any)
	if !ok {
		return essential{}, false
	}
	e := essential{spec: top["spec"]}
	if annotations, ok := meta["annotations"].(map[string]any); ok {
		value, given := annotations[annotationDryRun].(string)
		if given {
			e.dryRun = "=" + value
		}
	}
	return e, true
}
