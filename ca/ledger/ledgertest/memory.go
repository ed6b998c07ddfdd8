package ledgertest

import (
	"bytes"
	"context"
	"fmt"
	"iter"
	"slices"
	"sync"
	"time"

	"castellan.dev/ca/ledger"
)

// Memory is a ledger that forgets: for tests of what needs one. It passes Run.
type Memory struct {
	Now func() time.Time

	mu   sync.Mutex
	rows []ledger.Entry
	fail error
}

var _ ledger.Ledger = (*Memory)(nil)

// Fail makes every later Intent fail with err, until called with nil.
func (m *Memory) Fail(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.fail = err
}

// Intent implements ledger.Recorder.
func (m *Memory) Intent(ctx context.Context, e ledger.Entry) (uint64, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.fail != nil {
		return 0, fmt.Errorf("%w: %w", ledger.ErrUnavailable, m.fail)
	}
	if e.Serial == "" || e.Serial[0] == '0' {
		return 0, fmt.Errorf("ledger: serial %q is not lower-case hex without leading zeros", e.Serial)
	}
	now := time.Now
	if m.Now != nil {
		now = m.Now
	}
	e.Sequence = uint64(len(m.rows)) + 1
	e.RecordedAt = now().UTC().Truncate(time.Microsecond)
	e.NotBefore = e.NotBefore.UTC().Truncate(time.Second)
	e.NotAfter = e.NotAfter.UTC().Truncate(time.Second)
	e.Outcome, e.LeafHash = ledger.Pending, [32]byte{}
	m.rows = append(m.rows, e)
	return e.Sequence, nil
}

// Result implements ledger.Recorder.
func (m *Memory) Result(sequence uint64, r ledger.Result) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if sequence == 0 || sequence > uint64(len(m.rows)) {
		return
	}
	if e := &m.rows[sequence-1]; e.Outcome == ledger.Pending {
		e.Outcome, e.LeafHash = r.Outcome, r.LeafHash
	}
}

// Query implements ledger.Reader.
func (m *Memory) Query(_ context.Context, f ledger.Filter) iter.Seq2[ledger.Entry, error] {
	return func(yield func(ledger.Entry, error) bool) {
		m.mu.Lock()
		rows := slices.Clone(m.rows)
		m.mu.Unlock()
		n := 0
		for _, e := range rows {
			if !selects(f, e) {
				continue
			}
			if n++; !yield(e, nil) || n == f.Limit {
				return
			}
		}
	}
}

func selects(f ledger.Filter, e ledger.Entry) bool {
	is := func(want, have string) bool { return want == "" || want == have }
	return e.Sequence > f.After &&
		is(f.Serial, e.Serial) && is(f.PodUID, e.PodUID) && is(f.Node, e.Node) && is(f.Attestor, e.Attestor) &&
		(f.SPIFFEID.IsZero() || f.SPIFFEID == e.SPIFFEID) &&
		(len(f.SubjectKeyID) == 0 || bytes.Equal(f.SubjectKeyID, e.SubjectKeyID)) &&
		(len(f.IssuerKeyID) == 0 || bytes.Equal(f.IssuerKeyID, e.IssuerKeyID)) &&
		(f.Since.IsZero() || !e.RecordedAt.Before(f.Since)) &&
		(f.Until.IsZero() || e.RecordedAt.Before(f.Until))
}

// BySerial implements ledger.Reader.
func (m *Memory) BySerial(ctx context.Context, serial string) (ledger.Entry, error) {
	for e, err := range m.Query(ctx, ledger.Filter{Serial: serial}) {
		return e, err
	}
	return ledger.Entry{}, fmt.Errorf("%w of serial %s", ledger.ErrNotFound, serial)
}

// Rows implements ledger.Reader.
func (m *Memory) Rows(context.Context) (uint64, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return uint64(len(m.rows)), nil
}

// Healthy implements ledger.Ledger.
func (m *Memory) Healthy() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.fail
}

// Close implements ledger.Ledger.
func (m *Memory) Close() error {
	m.Fail(fmt.Errorf("closed"))
	return nil
}
