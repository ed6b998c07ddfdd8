package ledger_test

import (
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"

	"castellan.dev/ca/ledger"
	"castellan.dev/ca/ledger/ledgertest"
)

// BenchmarkIntent is the ledger's part of an issuance, 16 callers at a time. CPU
// is what counts: waiting for the disk is not work.
func BenchmarkIntent(b *testing.B) {
	l, err := ledger.Open(b.Context(), ledger.Config{Path: filepath.Join(b.TempDir(), "ledger.db")})
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	var n atomic.Int64
	b.SetParallelism(16)
	b.ReportAllocs()
	b.ResetTimer()
	start := cpu()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			seq, err := l.Intent(b.Context(), ledgertest.Entry(int(n.Add(1))))
			if err != nil {
				b.Error(err)
				return
			}
			l.Result(seq, ledger.Result{Outcome: ledger.Issued})
		}
	})
	b.ReportMetric(float64(cpu()-start)/1000/float64(b.N), "cpu-us/op")
}

func cpu() int64 {
	var r syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &r); err != nil {
		return 0
	}
	return r.Utime.Nano() + r.Stime.Nano()
}
