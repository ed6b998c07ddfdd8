package ledger

import (
	"context"
	"fmt"
	"iter"
	"strconv"
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
		if err := s.query(ctx, f, yield); err != nil {
			yield(Entry{}, err)
		}
	}
}

func (s *SQLite) query(ctx context.Context, f Filter, yield func(Entry, error) bool) error {
	where, args, err := f.where()
	if err != nil {
		return err
	}
	candidates, narrowed, err := s.candidates(ctx, f)
	if err != nil {
		return fmt.Errorf("ledger: query: %w", err)
	}
	after, left := f.After, f.Limit
	for {
		var page []Entry
		var more bool
		if narrowed {
			n := min(queryPage, len(candidates))
			page, err = s.rows(ctx, where+"seq IN (SELECT value FROM json_each(?)) ORDER BY seq", append(args[:len(args):len(args)], jsonArray(candidates[:n])))
			candidates = candidates[n:]
			more = len(candidates) > 0
		} else {
			page, err = s.rows(ctx, where+"seq > ? ORDER BY seq LIMIT ?", append(args[:len(args):len(args)], int64(after), queryPage))
			more = len(page) == queryPage
		}
		if err != nil {
			return fmt.Errorf("ledger: query: %w", err)
		}
		for _, e := range page {
			if !yield(e, nil) {
				return nil
			}
			after = e.Sequence
			if left--; left == 0 {
				return nil
			}
		}
		if !more {
			return nil
		}
	}
}

// candidates returns the sequences that the indexes give for f, oldest first,
// with those of the tail that is not indexed yet, in one look at the database.
// The second result is false where no index narrows the search.
func (s *SQLite) candidates(ctx context.Context, f Filter) ([]int64, bool, error) {
	var q string
	var args []any
	if f.Serial != "" {
		serial, err := packSerial(f.Serial)
		if err != nil {
			return nil, false, err
		}
		q = `SELECT seq FROM by_serial WHERE serial = ?1 AND seq > ?2
			UNION SELECT seq FROM intents WHERE seq > (SELECT through FROM indexed) AND serial = ?1 AND seq > ?2`
		args = []any{serial, int64(f.After)}
	} else {
		who := "SELECT id FROM subjects WHERE "
		for _, c := range f.subject() {
			if c.value != "" {
				who += c.cond + " AND "
				args = append(args, c.value)
			}
		}
		if len(args) == 0 {
			return nil, false, nil
		}
		// The conditions are numbered by place in both halves.
		q = "WITH who AS (" + who + `TRUE)
			SELECT seq FROM by_subject WHERE subject IN who AND seq > ?
			UNION SELECT seq FROM intents WHERE seq > (SELECT through FROM indexed) AND subject IN who AND seq > ?`
		args = append(args, int64(f.After), int64(f.After))
	}
	rows, err := s.readers.QueryContext(ctx, q+" ORDER BY seq", args...)
	if err != nil {
		return nil, false, err
	}
	defer func() { _ = rows.Close() }() // what went wrong is in rows.Err
	var list []int64
	for rows.Next() {
		var seq int64
		if err := rows.Scan(&seq); err != nil {
			return nil, false, err
		}
		list = append(list, seq)
	}
	return list, true, rows.Err()
}

func jsonArray(list []int64) string {
	b := []byte{'['}
	for i, n := range list {
		if i > 0 {
			b = append(b, ',')
		}
		b = strconv.AppendInt(b, n, 10)
	}
	return string(append(b, ']'))
}

func (s *SQLite) rows(ctx context.Context, where string, args []any) ([]Entry, error) {
	rows, err := s.readers.QueryContext(ctx, selectLedger+" WHERE "+where, args...)
	if err != nil {
		return nil, err
	}
	defer func() { _ = rows.Close() }() // what went wrong is in rows.Err
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

// condition is one comparison of a text column.
type condition struct{ cond, value string }

func (f Filter) subject() []condition {
	id := ""
	if !f.SPIFFEID.IsZero() {
		id = f.SPIFFEID.String()
	}
	return []condition{{"spiffe_id = ?", id}, {"pod_uid = ?", f.PodUID}, {"node = ?", f.Node}}
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
	for _, c := range append(f.subject(), condition{"attestor = ?", f.Attestor}) {
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
	if serial == "" { // which would select everything
		return Entry{}, fmt.Errorf("%w without a serial", ErrNotFound)
	}
	for e, err := range s.Query(ctx, Filter{Serial: serial, Limit: 1}) {
		return e, err
	}
	return Entry{}, fmt.Errorf("%w of serial %s", ErrNotFound, serial)
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
