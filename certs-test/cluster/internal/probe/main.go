// Command probe is what the testbed's own tests run in pods: a server that says who
// it is, a client, and an admission webhook that refuses everything.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}

func run(args []string) error {
	switch {
	case len(args) == 1 && args[0] == "serve":
		fmt.Println("probe is serving")
		return http.ListenAndServe(":8080", http.HandlerFunc(whoami))
	case len(args) == 1 && args[0] == "refuse":
		return http.ListenAndServeTLS(":8443", "/tls/tls.crt", "/tls/tls.key", http.HandlerFunc(refuse))
	case len(args) == 2 && args[0] == "get":
		return get(args[1])
	case len(args) == 2 && args[0] == "read":
		data, err := os.ReadFile(args[1])
		fmt.Print(string(data))
		return err
	case len(args) == 3 && args[0] == "write":
		return os.WriteFile(args[1], []byte(args[2]), 0o644)
	case len(args) == 2 && args[0] == "mount":
		return unix.Mount("tmpfs", args[1], "tmpfs", 0, "")
	case len(args) == 2 && args[0] == "unmount":
		return unix.Unmount(args[1], 0)
	}
	return errors.New("usage: probe serve | refuse | get URL | read FILE | write FILE TEXT | mount DIR | unmount DIR")
}

func whoami(w http.ResponseWriter, _ *http.Request) {
	name, _ := os.Hostname()
	fmt.Fprint(w, name)
}

func get(url string) error {
	resp, err := (&http.Client{Timeout: 5 * time.Second}).Get(url)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	_, err = io.Copy(os.Stdout, resp.Body)
	return err
}

func refuse(w http.ResponseWriter, r *http.Request) {
	var review struct {
		APIVersion, Kind string
		Request          struct{ UID string }
	}
	if err := json.NewDecoder(r.Body).Decode(&review); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	_ = json.NewEncoder(w).Encode(map[string]any{
		"apiVersion": review.APIVersion, "kind": review.Kind,
		"response": map[string]any{
			"uid": review.Request.UID, "allowed": false,
			"status": map[string]any{"message": "the probe refuses"},
		},
	})
}
