package main

import (
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	castellanv1 "castellan.dev/api/castellan/v1"
)

// TestRefusedWorkloadsFileIsTold: a workloads file that is refused while the server
// runs shows in /readyz?verbose, as a metric and in what the operator asks, and its
// last good version stays in force.
func TestRefusedWorkloadsFileIsTold(t *testing.T) {
	s := newSite(t)
	stop, _ := s.start()
	conn, err := grpc.NewClient("unix:"+s.path("data/admin.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	problems := func() []string {
		t.Helper()
		st, err := castellanv1.NewAuthorityAdminClient(conn).Status(t.Context(), &castellanv1.AuthorityStatusRequest{})
		if err != nil {
			t.Fatal(err)
		}
		return st.GetProblems()
	}
	await := func(what string, is func() bool) {
		t.Helper()
		for deadline := time.Now().Add(30 * time.Second); !is(); {
			if time.Now().After(deadline) {
				_, body := s.get("/readyz?verbose")
				t.Fatalf("%s: not told of\n%s%v", what, body, problems())
			}
			<-time.After(10 * time.Millisecond)
		}
	}
	metric := func() string { _, text := s.get("/metrics"); return text }
	if got := problems(); len(got) != 0 || !strings.Contains(metric(), "castellan_workloads_file_refused 0") {
		t.Fatalf("problems of a healthy server: %q", got)
	}
	good, err := os.ReadFile(s.path("workloads.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	s.write("workloads.yaml", "junk: 1\n")
	// Before it is written it is empty, and refused for that.
	await("a refused file", func() bool { got := problems(); return len(got) == 1 && strings.Contains(got[0], `"junk"`) })
	if got := problems()[0]; !strings.HasPrefix(got, "workloads file: ") || !strings.Contains(got, s.path("workloads.yaml")) {
		t.Errorf("problem %q", got)
	}
	code, body := s.get("/readyz?verbose")
	if code != http.StatusOK || !strings.Contains(body, "[!] workloadsFile: ") {
		t.Errorf("%d\n%s", code, body)
	}
	if !strings.Contains(metric(), "castellan_workloads_file_refused 1") {
		t.Error("no metric")
	}
	s.write("workloads.yaml", string(good))
	await("a mended file", func() bool {
		return len(problems()) == 0 && strings.Contains(metric(), "castellan_workloads_file_refused 0")
	})
	if err := stop(); err != nil {
		t.Error(err)
	}
}
