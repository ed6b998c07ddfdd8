package ledger

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"iter"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// queryPage is how many rows one statement reads. Each page is its own read, so
// that a slow consumer does not hold the write-ahead log.
const queryPage = 512

const selectLedger = `SELECT seq, serial, spiffe_id, pod_uid, node, cluster, attestor, subject_key, issuer_key,
	tbs_sha256, leaf_sha256, recorded_at, not_before, not_after, outcome FROM ledger`

// flush lets the writer add the results that wait, so that a query sees them. A
// ledger that cannot be written can still be read, so errors do not matter here.
func (s *SQLite) flush(ctx context.Context) {
	if !s.hasResults() {
		return
	}
	done := make(chan struct{})
	select {
	case s.flushes <- done:
		select {
		case <-done:
		case <-ctx.Done():
		}
	case <-s.stopped:
	case <-ctx.Done():
	}
}

// Query implements Reader.
func (s *SQLite) Query(ctx context.Context, f Filter) iter.Seq2[Entry, error] {
	return func(yield func(Entry, error) bool) {
		s.flush(ctx)
		where, args, err := f.where()
		if err != nil {
			yield(Entry{}, err)
			return
		}
		after, left := f.After, f.Limit
		for {
			page := queryPage
			if f.Limit > 0 {
				page = min(page, left)
			}
			rows, err := s.page(ctx, where, args, after, page)
			if err != nil {
				yield(Entry{}, fmt.Errorf("ledger: query: %w", err))
				return
			}
			for _, e := range rows {
				if !yield(e, nil) {
					return
				}
				after = e.Sequence
			}
			left -= len(rows)
			if len(rows) < page || (f.Limit > 0 && left <= 0) {
				return
			}
		}
	}
}

func (s *SQLite) page(ctx context.Context, where string, args []any, after uint64, limit int) ([]Entry, error) {
	all := append(append(make([]any, 0, len(args)+2), args...), int64(after), limit)
	rows, err := s.readers.QueryContext(ctx, selectLedger+" WHERE "+where+"seq > ? ORDER BY seq LIMIT ?", all...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var page []Entry
	for rows.Next() {
		e, err := scan(rows)
		if err != nil {
			return nil, err
		}
		page = append(page, e)
	}
	return page, rows.Err()
}

// where builds the condition; it ends with "AND " unless empty. No text of the
// filter becomes part of the statement.
func (f Filter) where() (string, []any, error) {
	var b strings.Builder
	var args []any
	add := func(cond string, arg any) {
		b.WriteString(cond + " AND ")
		args = append(args, arg)
	}
	if f.Serial != "" {
		serial, err := packSerial(f.Serial)
		if err != nil {
			return "", nil, err
		}
		add("serial = ?", serial)
	}
	if !f.SPIFFEID.IsZero() {
		add("spiffe_id = ?", f.SPIFFEID.String())
	}
	for _, c := range []struct{ cond, value string }{{"pod_uid = ?", f.PodUID}, {"node = ?", f.Node}, {"attestor = ?", f.Attestor}} {
		if c.value != "" {
			add(c.cond, c.value)
		}
	}
	if len(f.SubjectKeyID) > 0 {
		add("subject_key = ?", f.SubjectKeyID)
	}
	if len(f.IssuerKeyID) > 0 {
		add("issuer_key = ?", f.IssuerKeyID)
	}
	if !f.Since.IsZero() {
		add("recorded_at >= ?", f.Since.UnixMicro())
	}
	if !f.Until.IsZero() {
		add("recorded_at < ?", f.Until.UnixMicro())
	}
	return b.String(), args, nil
}

// BySerial implements Reader.
func (s *SQLite) BySerial(ctx context.Context, serial string) (Entry, error) {
	packed, err := packSerial(serial)
	if err != nil {
		return Entry{}, err
	}
	s.flush(ctx)
	e, err := scan(s.readers.QueryRowContext(ctx, selectLedger+" WHERE serial = ? ORDER BY seq LIMIT 1", packed))
	if errors.Is(err, sql.ErrNoRows) {
		return Entry{}, fmt.Errorf("%w of serial %s", ErrNotFound, serial)
	}
	if err != nil {
		return Entry{}, fmt.Errorf("ledger: query: %w", err)
	}
	return e, nil
}

// Rows implements Reader. Sequences are dense: rows are never removed.
func (s *SQLite) Rows(ctx context.Context) (n uint64, err error) {
	if err := s.readers.QueryRowContext(ctx, "SELECT coalesce(max(seq), 0) FROM intents").Scan(&n); err != nil {
		return 0, fmt.Errorf("ledger: query: %w", err)
	}
	return n, nil
}

func scan(row interface{ Scan(...any) error }) (Entry, error) {
	var e Entry
	var serial, tbs, leaf []byte
	var id string
	var recorded, notBefore, notAfter int64
	if err := row.Scan(&e.Sequence, &serial, &id, &e.PodUID, &e.Node, &e.Cluster, &e.Attestor, &e.SubjectKeyID, &e.IssuerKeyID,
		&tbs, &leaf, &recorded, &notBefore, &notAfter, &e.Outcome); err != nil {
		return Entry{}, err
	}
	if id != "" {
		parsed, err := spiffeid.FromString(id)
		if err != nil {
			return Entry{}, fmt.Errorf("row %d: SPIFFE ID %q: %w", e.Sequence, id, err)
		}
		e.SPIFFEID = parsed
	}
	e.Serial = unpackSerial(serial)
	copy(e.TBSHash[:], tbs)
	copy(e.LeafHash[:], leaf)
	e.RecordedAt = time.UnixMicro(recorded).UTC()
	e.NotBefore = time.Unix(notBefore, 0).UTC()
	e.NotAfter = time.Unix(notAfter, 0).UTC()
	return e, nil
}
