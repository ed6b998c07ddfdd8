// Package health answers the kubelet: whether the proxy is ready, and, in place of
// the application behind it, the application's own probes, which the kubelet has no
// certificate to ask for.
//
// It answers in the clear to whoever can reach it, so it says little: a status, no
// reason, and nothing of what the application answered but its status. Paths are
// those configured, and no other. However many ask, each probe is asked of the
// application once at a time and the answer is shared: who asks a lot neither loads
// the application nor keeps the kubelet from its answer. Redirects are not
// followed, so that an application cannot have the proxy ask elsewhere.
package health

import (
	"fmt"
	"net/http"
)

// Ready is 200 while every check returns nil, and 503 otherwise.
func Ready(checks ...func() error) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz/ready", func(w http.ResponseWriter, _ *http.Request) {
		for _, check := range checks {
			if check() != nil {
				http.Error(w, "not ready", http.StatusServiceUnavailable)
				return
			}
		}
		fmt.Fprintln(w, "ready")
	})
	return mux
}
