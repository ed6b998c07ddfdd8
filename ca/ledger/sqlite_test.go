package ledger_test

import (
	"os"
	"path/filepath"
	"testing"

	"go.uber.org/goleak"

	"castellan.dev/ca/ledger"
	"castellan.dev/ca/ledger/ledgertest"
)

func TestMain(m *testing.M) {
	if path := os.Getenv(childLedger); path != "" {
		writeUntilKilled(path)
	}
	goleak.VerifyTestMain(m)
}

func open(t *testing.T, path string, clock *ledgertest.Clock) *ledger.SQLite {
	t.Helper()
	cfg := ledger.Config{Path: path}
	if clock != nil {
		cfg.Now = clock.Now
	}
	l, err := ledger.Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func TestSQLiteConformance(t *testing.T) {
	ledgertest.Run(t, func(t *testing.T, clock *ledgertest.Clock) ledger.Ledger {
		return open(t, filepath.Join(t.TempDir(), "ledger.db"), clock)
	})
}

func TestMemoryConformance(t *testing.T) {
	ledgertest.Run(t, func(_ *testing.T, clock *ledgertest.Clock) ledger.Ledger {
		return &ledgertest.Memory{Now: clock.Now}
	})
}

// The tail that was not indexed when a process ended is found after a restart,
// and indexed by the next.
func TestTailIsFoundAfterRestart(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ledger.db")
	for round := range 3 {
		l := open(t, path, nil)
		for i := range 3 {
			if _, err := l.Intent(t.Context(), ledgertest.Entry(round*3+i)); err != nil {
				t.Fatal(err)
			}
		}
		for i := range round*3 + 3 {
			if _, err := l.BySerial(t.Context(), ledgertest.Entry(i).Serial); err != nil {
				t.Errorf("round %d, row %d: %v", round, i, err)
			}
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
