package webhook

import (
	"context"
	"encoding/json"
	"net/http"

	admissionv1 "k8s.io/api/admission/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Results of /inject beside the common ones.
const (
	resultInjected  = "injected"
	resultUnchanged = "unchanged"
	resultSkipped   = "skipped"
	resultRefused   = "refused"
)

// inject answers a review of a pod. What is no new pod passes as it is: the
// configuration asks about nothing else.
func (s *Server) inject(ctx context.Context, req *admissionv1.AdmissionRequest) answer {
	if req.Operation != admissionv1.Create || req.Kind != (metav1.GroupVersionKind{Version: "v1", Kind: "Pod"}) || req.SubResource != "" {
		return answer{resultSkipped, allowed()}
	}
	var pod corev1.Pod
	if err := json.Unmarshal(req.Object.Raw, &pod); err != nil {
		s.refused(ctx, "pod cannot be read", req, shorten(err.Error()))
		return answer{resultRefused, denied(http.StatusBadRequest, metav1.StatusReasonBadRequest, "the pod cannot be read")}
	}
	// The object's own word on its namespace may be missing, and is not the API server's.
	ns := Namespace{Name: req.Namespace, Selected: true}
	if s.cfg.Namespaces != nil {
		ns.Labels, _ = s.cfg.Namespaces.Labels(req.Namespace)
	}
	result, err := s.cfg.Injector.Inject(&pod, ns)
	if err != nil {
		s.refused(ctx, "pod refused", req, err.Error())
		return answer{resultRefused, denied(http.StatusUnprocessableEntity, metav1.StatusReasonInvalid, "castellan: "+err.Error())}
	}
	response := allowed(bounded(result.Warnings)...)
	if result.Decision == Skipped {
		return answer{resultSkipped, response}
	}
	patch, err := Patch(&pod, result.Pod)
	if err != nil {
		s.refused(ctx, "pod cannot be patched", req, err.Error())
		return answer{resultFailed, denied(http.StatusInternalServerError, metav1.StatusReasonInternalError, "the sidecar cannot be added; Castellan's log says why")}
	}
	if patch == nil {
		return answer{resultUnchanged, response}
	}
	kind := admissionv1.PatchTypeJSONPatch
	response.Patch, response.PatchType = patch, &kind
	return answer{resultInjected, response}
}
