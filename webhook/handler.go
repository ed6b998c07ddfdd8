package webhook

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"mime"
	"net"
	"net/http"
	"runtime/debug"
	"time"

	admissionv1 "k8s.io/api/admission/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

const (
	// queueTimeout is how long a review waits for its turn; the API server's own
	// timeout is ten seconds.
	queueTimeout = 5 * time.Second
	maxUID       = 128
)

// Results that any review may have; the webhooks have others.
const (
	resultMalformed = "malformed"
	resultLimited   = "limited"
	resultFailed    = "failed"
)

// answer is what becomes of one review.
type answer struct {
	result   string
	response *admissionv1.AdmissionResponse
}

// webhook is one of the two.
type webhook struct {
	name        string
	maxElements int
	judge       func(ctx context.Context, req *admissionv1.AdmissionRequest) answer
}

func (s *Server) handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("POST "+InjectPath, s.serve(webhook{"inject", maxPodElements, s.inject}))
	mux.Handle("POST "+ValidatePath, s.serve(webhook{"validate", maxPolicyElements, s.validate}))
	return mux
}

// httpError is answered in place of a review. Its text is constant: what a stranger
// sent is not sent back.
type httpError struct {
	code   int
	result string
	text   string
}

func (e *httpError) Error() string { return e.text }

func (s *Server) serve(w webhook) http.Handler {
	return http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		began := s.cfg.Now()
		result, err := s.review(rw, r, w)
		var refused *httpError
		if errors.As(err, &refused) {
			result = refused.result
			http.Error(rw, refused.text, refused.code)
		}
		s.metrics.reviews.WithLabelValues(w.name, result).Inc()
		s.metrics.seconds.WithLabelValues(w.name).Observe(s.cfg.Now().Sub(began).Seconds())
	})
}

// review reads, judges and answers one review.
func (s *Server) review(rw http.ResponseWriter, r *http.Request, w webhook) (result string, err error) {
	ctx, cancel := context.WithTimeout(r.Context(), queueTimeout)
	defer cancel()
	body, release, err := s.read(ctx, rw, r)
	if err != nil {
		return "", err
	}
	defer release()
	if elements(body) > w.maxElements {
		return "", &httpError{http.StatusRequestEntityTooLarge, resultLimited, "review has too many elements"}
	}
	done, err := s.budget.worked.take(ctx, sourceOf(r))
	if err != nil {
		return "", &httpError{http.StatusServiceUnavailable, resultLimited, "too many reviews at once"}
	}
	defer done()
	req, err := decodeReview(body)
	if err != nil {
		return "", err
	}
	if ctx.Err() != nil { // nobody waits for the rest
		return "", &httpError{http.StatusServiceUnavailable, resultLimited, "too many reviews at once"}
	}
	a := s.guard(ctx, w, req)
	a.response.UID = req.UID
	data, err := json.Marshal(admissionv1.AdmissionReview{TypeMeta: reviewType(), Response: a.response})
	if err != nil {
		s.log.Error("answer to a review cannot be written", slog.String("webhook", w.name), slog.Any("error", err))
		return "", &httpError{http.StatusInternalServerError, resultFailed, "internal error"}
	}
	s.metrics.warnings.WithLabelValues(w.name).Add(float64(len(a.response.Warnings)))
	rw.Header().Set("Content-Type", "application/json")
	_, _ = rw.Write(data) // the caller is gone: nobody to tell
	return a.result, nil
}

// read takes in the body within the budget.
func (s *Server) read(ctx context.Context, rw http.ResponseWriter, r *http.Request) ([]byte, func(), error) {
	if kind, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || kind != "application/json" {
		return nil, nil, &httpError{http.StatusUnsupportedMediaType, resultMalformed, "want application/json"}
	}
	size := r.ContentLength
	if size > maxBody {
		return nil, nil, &httpError{http.StatusRequestEntityTooLarge, resultLimited, "review is too large"}
	}
	if size < 0 {
		size = maxBody
	}
	place, err := s.budget.take(ctx, sourceOf(r), size, func() {
		// What is being read ends; of a body that is whole meanwhile nothing is left to end.
		_ = http.NewResponseController(rw).SetReadDeadline(s.cfg.Now())
	})
	switch {
	case errors.Is(err, errTooMany):
		return nil, nil, &httpError{http.StatusTooManyRequests, resultLimited, "too many reviews at once"}
	case err != nil:
		return nil, nil, &httpError{http.StatusServiceUnavailable, resultLimited, "too many reviews at once"}
	}
	body, err := io.ReadAll(http.MaxBytesReader(rw, r.Body, size))
	place.read()
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &tooLarge):
		place.release()
		return nil, nil, &httpError{http.StatusRequestEntityTooLarge, resultLimited, "review is too large"}
	case err != nil:
		place.release()
		return nil, nil, &httpError{http.StatusBadRequest, resultMalformed, "review cannot be read"}
	}
	return body, place.release, nil
}

// sourceOf is the address a review comes from.
func sourceOf(r *http.Request) string {
	source, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		return r.RemoteAddr
	}
	return source
}

func reviewType() metav1.TypeMeta {
	return metav1.TypeMeta{APIVersion: admissionv1.SchemeGroupVersion.String(), Kind: "AdmissionReview"}
}

func decodeReview(body []byte) (*admissionv1.AdmissionRequest, error) {
	var review admissionv1.AdmissionReview
	if json.Unmarshal(body, &review) != nil || review.TypeMeta != reviewType() {
		return nil, &httpError{http.StatusBadRequest, resultMalformed, "want an AdmissionReview of admission.k8s.io/v1"}
	}
	if req := review.Request; req != nil && req.UID != "" && len(req.UID) <= maxUID {
		return req, nil
	}
	return nil, &httpError{http.StatusBadRequest, resultMalformed, "want a review with a request and its uid"}
}

// guard judges; a panic denies, with its cause in the log only. An error of HTTP
// would instead be let pass where the configuration ignores failures.
func (s *Server) guard(ctx context.Context, w webhook, req *admissionv1.AdmissionRequest) (a answer) {
	defer func() {
		if cause := recover(); cause != nil {
			s.log.Error("review failed", slog.String("webhook", w.name), slog.String("uid", string(req.UID)),
				slog.String("panic", fmt.Sprint(cause)), slog.String("stack", string(debug.Stack())))
			a = answer{resultFailed, denied(http.StatusInternalServerError, metav1.StatusReasonInternalError, "Castellan failed to judge this object; its log says why")}
		}
	}()
	return w.judge(ctx, req)
}

func denied(code int32, reason metav1.StatusReason, message string) *admissionv1.AdmissionResponse {
	return &admissionv1.AdmissionResponse{Result: &metav1.Status{Status: metav1.StatusFailure, Code: code, Reason: reason, Message: message}}
}

func allowed(warnings ...string) *admissionv1.AdmissionResponse {
	return &admissionv1.AdmissionResponse{Allowed: true, Warnings: warnings}
}

// refused notes a refusal in the log, where there is room for it.
func (s *Server) refused(ctx context.Context, message string, req *admissionv1.AdmissionRequest, why string) {
	if !s.limit.Allow() {
		s.metrics.suppressed.Inc()
		return
	}
	s.log.LogAttrs(ctx, slog.LevelInfo, message, slog.String("kind", shorten(req.Kind.Kind)), slog.String("namespace", shorten(req.Namespace)),
		slog.String("name", shorten(req.Name)), slog.String("user", shorten(req.UserInfo.Username)), slog.String("reason", why))
}
