package ledger

import (
	"context"
	"database/sql"
	"encoding/hex"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"
)

const (
	maxBatch   = 256
	maxResults = 1 << 16
	maxCached  = 1 << 16

	// A commit costs as much as ten rows. Under load the writer therefore waits
	// for those it has just answered to come back, as long as they keep coming;
	// a lone caller never waits.
	lingerGap   = 2 * time.Millisecond
	lingerTotal = 10 * time.Millisecond

	// resultDelay bounds how long a result waits for an intent to share its commit.
	resultDelay = 100 * time.Millisecond
	// indexQuiet is after how many resultDelays without an intent the tail is
	// indexed.
	indexQuiet = 10
	// probeEvery is after how many resultDelays a ledger that failed is tried again.
	probeEvery = 10

	// indexEvery is how many rows wait at most for the indexes filled in bulk,
	// and so how long a tail a query scans.
	indexEvery = 2048

	intentColumns = 9
	resultColumns = 3
)

// intent is one waiting call. Whoever moves state from waiting owns it: the
// writer to commit it, the caller to give it up.
type intent struct {
	entry  Entry
	serial []byte
	state  atomic.Uint32
	done   chan struct{}
	seq    uint64
	err    error
}

const (
	waiting = iota
	taken
	abandoned
)

type pendingResult struct {
	seq uint64
	r   Result
}

// Intent implements Recorder.
func (s *SQLite) Intent(ctx context.Context, e Entry) (uint64, error) {
	serial, err := packSerial(e.Serial)
	if err != nil {
		return 0, err
	}
	in := &intent{entry: e, serial: serial, done: make(chan struct{})}
	select {
	case s.queue <- in:
	case <-s.stop:
		return 0, fmt.Errorf("%w: closed", ErrUnavailable)
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	select {
	case <-in.done:
	case <-s.stopped:
		// The writer is gone and may have answered last.
		select {
		case <-in.done:
		default:
			return 0, fmt.Errorf("%w: closed", ErrUnavailable)
		}
	case <-ctx.Done():
		if in.state.CompareAndSwap(waiting, abandoned) {
			return 0, ctx.Err()
		}
		<-in.done // being committed; a moment
	}
	return in.seq, in.err
}

// Result implements Recorder.
func (s *SQLite) Result(sequence uint64, r Result) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.results) >= maxResults {
		// Without its result the row stays an intent, which counts as issued.
		s.results = s.results[1:]
	}
	s.results = append(s.results, pendingResult{sequence, r})
}

func (s *SQLite) hasResults() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.results) > 0
}

func (s *SQLite) takeResults() []pendingResult {
	s.mu.Lock()
	defer s.mu.Unlock()
	taken := s.results
	s.results = nil
	return taken
}

func (s *SQLite) returnResults(r []pendingResult) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.results = append(r, s.results...)
	if over := len(s.results) - maxResults; over > 0 {
		s.results = s.results[over:]
	}
}

// writer owns the database connection.
type writer struct {
	s        *SQLite
	conn     *sql.Conn
	begin    *sql.Stmt
	commit   *sql.Stmt
	rollback *sql.Stmt
	intents  [5]*sql.Stmt // 1, 4, 16, 64 and 256 rows
	results  [5]*sql.Stmt

	last     uint64
	indexed  uint64
	subjects map[subject]int64
	issuers  map[string]int64
	expected int
	args     []any
	broken   error
}

// subject is one row of subjects.
type subject struct {
	id                              spiffeid.ID
	podUID, node, cluster, attestor string
}

func newWriter(ctx context.Context, s *SQLite) (*writer, error) {
	w := &writer{s: s, subjects: map[subject]int64{}, issuers: map[string]int64{}}
	var err error
	if w.conn, err = s.db.Conn(ctx); err != nil {
		return nil, err
	}
	prepare := func(q string) *sql.Stmt {
		if err != nil {
			return nil
		}
		var stmt *sql.Stmt
		stmt, err = w.conn.PrepareContext(ctx, q)
		return stmt
	}
	// On a conflict the whole transaction is given up, so "OR ROLLBACK": it spares
	// SQLite a journal for the statement alone.
	w.begin, w.commit, w.rollback = prepare("BEGIN IMMEDIATE"), prepare("COMMIT"), prepare("ROLLBACK")
	for i := range w.intents {
		rows := 1 << (2 * i)
		w.intents[i] = prepare("INSERT OR ROLLBACK INTO intents VALUES " + placeholders(rows, intentColumns))
		w.results[i] = prepare("INSERT OR IGNORE INTO results VALUES " + placeholders(rows, resultColumns))
	}
	if err == nil {
		err = w.conn.QueryRowContext(ctx, "SELECT (SELECT coalesce(max(seq), 0) FROM intents), through FROM indexed").Scan(&w.last, &w.indexed)
	}
	if err != nil {
		w.close()
		return nil, err
	}
	return w, nil
}

func placeholders(rows, columns int) string {
	row := "(" + strings.TrimSuffix(strings.Repeat("?,", columns), ",") + "),"
	return strings.TrimSuffix(strings.Repeat(row, rows), ",")
}

func (w *writer) run() {
	defer close(w.s.stopped)
	defer w.close()
	late := time.NewTicker(resultDelay)
	defer late.Stop()
	probe, quiet := 0, 0
	for {
		select {
		case first := <-w.s.queue:
			w.group(first)
			quiet = 0
			if w.last-w.indexed >= indexEvery {
				w.index()
			}
		case done := <-w.s.flushes:
			_ = w.write(nil) // told by Healthy
			close(done)
		case <-late.C:
			if w.s.Healthy() != nil {
				probe++
			}
			if (w.s.hasResults() && w.s.Healthy() == nil) || probe >= probeEvery {
				probe = 0
				_ = w.write(nil) // told by Healthy
			}
			if quiet++; quiet == indexQuiet {
				w.index()
			}
		case <-w.s.stop:
			_ = w.write(nil) // logged; a restart counts what is missing as issued
			w.refuseRest()
			return
		}
	}
}

// close ends the statements first: SQLite keeps a file open for one that is left.
func (w *writer) close() {
	stmts := append([]*sql.Stmt{w.begin, w.commit, w.rollback}, w.intents[:]...)
	for _, stmt := range append(stmts, w.results[:]...) {
		if stmt != nil {
			_ = stmt.Close()
		}
	}
	_ = w.conn.Close() // everything is committed
}

// refuseRest answers what was queued when the ledger closed.
func (w *writer) refuseRest() {
	err := fmt.Errorf("%w: closed", ErrUnavailable)
	w.s.failed.Store(&err)
	for {
		select {
		case in := <-w.s.queue:
			in.err = err
			close(in.done)
		default:
			return
		}
	}
}

// group collects what waits and writes it in one transaction.
func (w *writer) group(first *intent) {
	batch := append(make([]*intent, 0, max(w.expected, 1)), first)
	batch = w.drain(batch)
	if len(batch) < w.expected {
		batch = w.linger(batch)
	}
	kept := batch[:0]
	for _, in := range batch {
		if in.state.CompareAndSwap(waiting, taken) {
			kept = append(kept, in)
		}
	}
	if len(kept) == 0 {
		return
	}
	err := w.write(kept)
	for _, in := range kept {
		in.err = err
		close(in.done)
	}
	// Those just answered will be back, beside those who queued meanwhile.
	w.expected = min(len(kept)+len(w.s.queue), maxBatch)
}

func (w *writer) drain(batch []*intent) []*intent {
	for len(batch) < maxBatch {
		select {
		case in := <-w.s.queue:
			batch = append(batch, in)
		default:
			return batch
		}
	}
	return batch
}

// linger waits for the expected, as long as they keep coming.
func (w *writer) linger(batch []*intent) []*intent {
	end := time.NewTimer(lingerTotal)
	defer end.Stop()
	gap := time.NewTimer(lingerGap)
	defer gap.Stop()
	for len(batch) < w.expected {
		// Callers that could run have been waiting for the processor, not for
		// anything else: their turn comes before the timers are asked.
		runtime.Gosched()
		before := len(batch)
		if batch = w.drain(batch); len(batch) > before {
			gap.Reset(lingerGap)
			continue
		}
		select {
		case in := <-w.s.queue:
			batch = append(batch, in)
			gap.Reset(lingerGap)
		case <-gap.C:
			runtime.Gosched()
			before = len(batch)
			if batch = w.drain(batch); len(batch) == before {
				return batch
			}
			gap.Reset(lingerGap)
		case <-end.C:
			return w.drain(batch)
		case <-w.s.stop:
			return batch
		}
	}
	return batch
}

// write commits the intents and every waiting result. On any error nothing of it
// is durable, and the caller must not sign.
func (w *writer) write(batch []*intent) error {
	if w.broken != nil {
		return w.broken
	}
	results := w.s.takeResults()
	err := w.transaction(batch, results)
	if err == nil {
		if w.s.failed.Swap(nil) != nil {
			w.s.log.Info("ledger can be written again")
		}
		return nil
	}
	w.s.returnResults(results)
	// A row may have been interned in what was rolled back.
	clear(w.subjects)
	clear(w.issuers)
	w.s.log.Error("ledger cannot be written; nothing is signed until it can", "error", err, "intents", len(batch))
	err = fmt.Errorf("%w: %w", ErrUnavailable, err)
	if fatal(err) {
		// What the disk holds is no longer known: only a restart, which
		// recovers from the write-ahead log, may go on.
		w.broken = fmt.Errorf("%w (restart the server to recover)", err)
		err = w.broken
	}
	w.s.failed.Store(&err)
	return err
}

func (w *writer) transaction(batch []*intent, results []pendingResult) (err error) {
	ctx := context.Background()
	if _, err := w.begin.ExecContext(ctx); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			// SQLite has rolled back by itself after some errors; then this one says so.
			_, _ = w.rollback.ExecContext(ctx)
		}
	}()
	if len(batch)+len(results) == 0 || w.s.Healthy() != nil {
		if _, err := w.conn.ExecContext(ctx, "INSERT OR REPLACE INTO probe VALUES (1, ?)", w.s.now().Unix()); err != nil {
			return err
		}
	}
	if err := w.insertIntents(ctx, batch); err != nil {
		return err
	}
	if err := w.insertResults(ctx, results); err != nil {
		return err
	}
	if _, err := w.commit.ExecContext(ctx); err != nil {
		return err
	}
	w.last += uint64(len(batch))
	return nil
}

// index fills the indexes that are not worth a page per signature, in order and
// so at a fraction of the cost. Rows are complete without them, so an error only
// leaves a longer tail to scan.
func (w *writer) index() {
	if w.indexed == w.last || w.broken != nil || w.s.Healthy() != nil {
		return
	}
	ctx := context.Background()
	tx, err := w.conn.BeginTx(ctx, nil)
	if err == nil {
		for _, q := range []string{
			"INSERT INTO by_serial SELECT serial, seq FROM intents WHERE seq > ?1 AND seq <= ?2 ORDER BY serial",
			"INSERT INTO by_subject SELECT subject, seq FROM intents WHERE seq > ?1 AND seq <= ?2 ORDER BY subject, seq",
			"UPDATE indexed SET through = ?2 WHERE ?1 = through",
		} {
			if _, err = tx.ExecContext(ctx, q, int64(w.indexed), int64(w.last)); err != nil {
				break
			}
		}
		if err == nil {
			err = tx.Commit()
		} else {
			_ = tx.Rollback() // the error that counts is the first
		}
	}
	if err != nil {
		w.s.log.Error("ledger cannot be indexed; queries are slower", "error", err, "rows", w.last-w.indexed)
		return
	}
	w.indexed = w.last
}

func (w *writer) insertIntents(ctx context.Context, batch []*intent) error {
	if len(batch) == 0 {
		return nil
	}
	seq := w.last
	recorded := w.s.now().UnixMicro()
	w.args = w.args[:0]
	for _, in := range batch {
		seq++
		in.seq = seq
		e := &in.entry
		sub, err := w.subjectID(ctx, e)
		if err != nil {
			return err
		}
		iss, err := w.issuerID(ctx, e.IssuerKeyID)
		if err != nil {
			return err
		}
		w.args = append(w.args, int64(seq), in.serial, sub, iss, notNil(e.SubjectKeyID), e.TBSHash[:], recorded, e.NotBefore.Unix(), e.NotAfter.Unix())
	}
	return insert(ctx, &w.intents, w.args, intentColumns)
}

func (w *writer) insertResults(ctx context.Context, results []pendingResult) error {
	w.args = w.args[:0]
	for i := range results {
		p := &results[i]
		w.args = append(w.args, int64(p.seq), int64(p.r.Outcome), p.r.LeafHash[:])
	}
	return insert(ctx, &w.results, w.args, resultColumns)
}

// insert runs the largest prepared statement that fits, until all rows are in.
func insert(ctx context.Context, stmts *[5]*sql.Stmt, args []any, columns int) error {
	for len(args) > 0 {
		i := 0
		for i+1 < len(stmts) && columns<<(2*(i+1)) <= len(args) {
			i++
		}
		n := columns << (2 * i)
		if _, err := stmts[i].ExecContext(ctx, args[:n]...); err != nil {
			return err
		}
		args = args[n:]
	}
	return nil
}

func (w *writer) subjectID(ctx context.Context, e *Entry) (int64, error) {
	key := subject{e.SPIFFEID, e.PodUID, e.Node, e.Cluster, e.Attestor}
	if id, ok := w.subjects[key]; ok {
		return id, nil
	}
	args := []any{e.SPIFFEID.String(), e.PodUID, e.Node, e.Cluster, e.Attestor}
	id, err := w.intern(ctx, args,
		"SELECT id FROM subjects WHERE spiffe_id = ? AND pod_uid = ? AND node = ? AND cluster = ? AND attestor = ?",
		"INSERT INTO subjects (spiffe_id, pod_uid, node, cluster, attestor) VALUES (?, ?, ?, ?, ?)")
	if err != nil {
		return 0, err
	}
	if len(w.subjects) >= maxCached {
		clear(w.subjects)
	}
	w.subjects[key] = id
	return id, nil
}

func (w *writer) issuerID(ctx context.Context, key []byte) (int64, error) {
	if id, ok := w.issuers[string(key)]; ok {
		return id, nil
	}
	id, err := w.intern(ctx, []any{notNil(key)}, "SELECT id FROM issuers WHERE key_id = ?", "INSERT INTO issuers (key_id) VALUES (?)")
	if err != nil {
		return 0, err
	}
	w.issuers[string(key)] = id
	return id, nil
}

func (w *writer) intern(ctx context.Context, args []any, find, add string) (id int64, err error) {
	err = w.conn.QueryRowContext(ctx, find, args...).Scan(&id)
	if !errors.Is(err, sql.ErrNoRows) {
		return id, err
	}
	res, err := w.conn.ExecContext(ctx, add, args...)
	if err != nil {
		return 0, err
	}
	return res.LastInsertId()
}

// fatal holds for errors after which it is not known what the disk holds.
func fatal(err error) bool {
	var e *sqlite.Error
	if !errors.As(err, &e) {
		return false
	}
	switch e.Code() {
	case sqlite3.SQLITE_IOERR_FSYNC, sqlite3.SQLITE_IOERR_DIR_FSYNC:
		return true
	}
	switch e.Code() & 0xff {
	case sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB:
		return true
	}
	return false
}

func notNil(b []byte) []byte {
	if b == nil {
		return []byte{}
	}
	return b
}

// packSerial turns hex without leading zeros into bytes.
func packSerial(s string) ([]byte, error) {
	if s == "" || s[0] == '0' || len(s) > 40 || strings.ToLower(s) != s {
		return nil, fmt.Errorf("ledger: serial %q is not lower-case hex without leading zeros", s)
	}
	if len(s)%2 == 1 {
		s = "0" + s
	}
	b, err := hex.DecodeString(s)
	if err != nil {
		return nil, fmt.Errorf("ledger: serial: %w", err)
	}
	return b, nil
}

func unpackSerial(b []byte) string { return strings.TrimPrefix(hex.EncodeToString(b), "0") }
