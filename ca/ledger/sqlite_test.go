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
