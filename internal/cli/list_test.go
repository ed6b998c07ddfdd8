package cli_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"
	"sigs.k8s.io/yaml"

	castellanv1 "castellan.dev/api/castellan/v1"
	"castellan.dev/internal/cli"
	"castellan.dev/internal/up"
)

// longLedger streams rows, and before its last one waits for half.
type longLedger struct {
	castellanv1.UnimplementedAuthorityAdminServer
	rows int
	half chan struct{}
	fail bool
}

func (l *longLedger) ListIssued(_ *castellanv1.ListIssuedRequest, s grpc.ServerStreamingServer[castellanv1.LedgerRow]) error {
	for i := range l.rows {
		if i == l.rows-1 && l.half != nil {
			select {
			case <-l.half:
			case <-time.After(30 * time.Second):
				return status.Error(codes.DeadlineExceeded, "nothing was written meanwhile")
			}
		}
		row := &castellanv1.LedgerRow{
			Sequence: uint64(i), Serial: fmt.Sprintf("%x", 1<<40+i), SpiffeId: fmt.Sprintf("spiffe://cluster.local/ns/shop/sa/orders-%d", i),
			Outcome: "issued", CreatedAt: timestamppb.New(time.Unix(1e9, 0)), NotBefore: timestamppb.New(time.Unix(1e9, 0)), NotAfter: timestamppb.New(time.Unix(2e9, 0)),
		}
		if err := s.Send(row); err != nil {
			return err
		}
	}
	if l.fail {
		return status.Error(codes.Internal, "the disk is gone")
	}
	return nil
}

func (l *longLedger) Status(context.Context, *castellanv1.AuthorityStatusRequest) (*castellanv1.AuthorityStatus, error) {
	return &castellanv1.AuthorityStatus{TrustDomain: "cluster.local"}, nil
}

// ledgerMesh is a mesh of which only the ledger answers.
func ledgerMesh(t *testing.T, ledger *longLedger) (upFile string) {
	t.Helper()
	dir := t.TempDir()
	file := up.File{Server: up.Server{Admin: filepath.Join(dir, "admin.sock")}}
	upFile = filepath.Join(dir, "up.json")
	writeUp(t, upFile, file)
	s := grpc.NewServer()
	castellanv1.RegisterAuthorityAdminServer(s, ledger)
	(&liveMesh{t: t}).serve(listen(t, "unix", file.Server.Admin), s.Serve, s.Stop)
	return upFile
}

// firstBytes closes seen at the first write.
type firstBytes struct {
	bytes.Buffer
	once sync.Once
	seen chan struct{}
}

func (f *firstBytes) Write(b []byte) (int, error) {
	f.once.Do(func() { close(f.seen) })
	return f.Buffer.Write(b)
}

// The ledger may be larger than memory: rows are written as they come.
func TestIssuedStreams(t *testing.T) {
	const rows = 2000
	for _, format := range []string{"table", "json", "yaml"} {
		t.Run(format, func(t *testing.T) {
			out := &firstBytes{seen: make(chan struct{})}
			upFile := ledgerMesh(t, &longLedger{rows: rows, half: out.seen})
			var errw bytes.Buffer
			if code := cli.Main([]string{"castellan", "ca", "issued", "--up", upFile, "-o", format}, strings.NewReader(""), out, &errw); code != 0 {
				t.Fatalf("exit code %d: %s", code, errw.String())
			}
			var got []struct{ SPIFFEID string }
			switch format {
			case "table":
				lines := strings.Split(strings.TrimSpace(out.String()), "\n")
				if len(lines) != rows+1 || !strings.Contains(lines[rows], fmt.Sprintf("orders-%d ", rows-1)) {
					t.Errorf("%d lines, the last %q", len(lines), lines[len(lines)-1])
				}
				return
			case "json":
				if err := json.Unmarshal(out.Bytes(), &got); err != nil {
					t.Fatal(err)
				}
			case "yaml":
				if err := yaml.Unmarshal(out.Bytes(), &got); err != nil {
					t.Fatal(err)
				}
			}
			if len(got) != rows || got[rows-1].SPIFFEID != fmt.Sprintf("spiffe://cluster.local/ns/shop/sa/orders-%d", rows-1) {
				t.Errorf("%d rows", len(got))
			}
		})
	}
}

// Half a list is an error, and does not pass for a whole one.
func TestIssuedBreaks(t *testing.T) {
	upFile := ledgerMesh(t, &longLedger{rows: 3, fail: true})
	r := castellanRun(t, "ca", "issued", "--up", upFile, "-o", "json").want(t, 1, "the disk is gone")
	if json.Valid([]byte(r.out)) {
		t.Errorf("valid JSON: %s", r.out)
	}
}

// What is written one by one looks as if it had been written together.
func TestIssuedLooksTheSame(t *testing.T) {
	for _, n := range []int{0, 1, 3} {
		upFile := ledgerMesh(t, &longLedger{rows: n})
		asJSON := castellanRun(t, "ca", "issued", "--up", upFile, "-o", "json").want(t, 0)
		var rows []map[string]any
		asJSON.decode(t, &rows)
		var indented bytes.Buffer
		if err := json.Indent(&indented, []byte(asJSON.out), "", "  "); err != nil || indented.String() != asJSON.out {
			t.Errorf("%d rows: %v in\n%s", n, err, asJSON.out)
		}
		var fromYAML []map[string]any
		if err := yaml.Unmarshal([]byte(castellanRun(t, "ca", "issued", "--up", upFile, "-o", "yaml").want(t, 0).out), &fromYAML); err != nil || !reflect.DeepEqual(rows, fromYAML) {
			t.Errorf("%d rows: %v, %v", n, err, fromYAML)
		}
	}
}
