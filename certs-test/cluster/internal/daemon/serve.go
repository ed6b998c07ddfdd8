package daemon

import (
	"context"
	"net"
	"net/http"
	"os"
)

// serve takes requests to kill and start parts, on a socket in the cluster's folder.
func (d *daemon) serve() error {
	listener, err := net.Listen("unix", d.opts.Path("control.sock"))
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /kill/{name}", func(w http.ResponseWriter, r *http.Request) {
		answer(w, d.parts.kill(r.PathValue("name")))
	})
	mux.HandleFunc("POST /start/{name}", func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), patience)
		defer cancel()
		answer(w, d.parts.start(ctx, r.PathValue("name")))
	})
	go func() {
		err := http.Serve(listener, mux) //nolint:gosec // a socket that only root reaches
		_, _ = os.Stderr.WriteString(err.Error() + "\n")
	}()
	return nil
}

func answer(w http.ResponseWriter, err error) {
	if err != nil {
		http.Error(w, err.Error(), http.StatusConflict)
	}
}
