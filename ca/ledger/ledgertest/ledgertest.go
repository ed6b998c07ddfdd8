// Package ledgertest holds what every ledger must do, as one suite, and a ledger
// in memory for tests of its users.
package ledgertest

import (
	stdcmp "cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"castellan.dev/ca/ledger"
)

// Clock is the time the suite gives to the ledger under test.
type Clock struct {
	mu sync.Mutex
	t  time.Time
}

// Now returns the clock's time.
func (c *Clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.t
}

// Set moves the clock.
func (c *Clock) Set(t time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.t = t
}

// Start is the suite's first moment.
var Start = time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)

// Entry returns a row with everything filled in, its serial derived from n.
func Entry(n int) ledger.Entry {
	sum := sha256.Sum256(fmt.Append(nil, n))
	sum[0] |= 0x80
	return ledger.Entry{
		Serial:       fmt.Sprintf("%x", sum[:16]),
		SPIFFEID:     spiffeid.RequireFromString("spiffe://cluster.local/ns/shop/sa/orders"),
		PodUID:       "0b5cbd4e-4b62-4d4c-9a9e-3f7b7b1b0a11",
		Node:         "node-1",
		Cluster:      "Kubernetes",
		Attestor:     "https://issuer.example",
		SubjectKeyID: sum[:20],
		IssuerKeyID:  []byte("issuer-key-0123456789"),
		TBSHash:      sum,
		NotBefore:    Start.Add(-30 * time.Second),
		NotAfter:     Start.Add(time.Hour),
	}
}

// Run runs the suite. open makes an empty ledger whose clock is the given one.
func Run(t *testing.T, open func(t *testing.T, clock *Clock) ledger.Ledger) {
	t.Helper()
	for name, test := range map[string]func(*testing.T, ledger.Ledger, *Clock){
		"round trip":     roundTrip,
		"sequence rises": sequenceRises,
		"filters":        filters,
		"paging":         paging,
		"not found":      notFound,
		"concurrent":     concurrent,
		"cancelled":      cancelled,
		"bad serial":     badSerial,
		"closed":         closed,
	} {
		t.Run(name, func(t *testing.T) {
			clock := &Clock{t: Start}
			l := open(t, clock)
			t.Cleanup(func() { _ = l.Close() })
			test(t, l, clock)
		})
	}
}

func record(t *testing.T, l ledger.Ledger, e ledger.Entry) uint64 {
	t.Helper()
	seq, err := l.Intent(t.Context(), e)
	if err != nil {
		t.Fatalf("intent: %v", err)
	}
	return seq
}

func collect(t *testing.T, l ledger.Ledger, f ledger.Filter) []ledger.Entry {
	t.Helper()
	var rows []ledger.Entry
	for e, err := range l.Query(t.Context(), f) {
		if err != nil {
			t.Fatalf("query: %v", err)
		}
		rows = append(rows, e)
	}
	return rows
}

func roundTrip(t *testing.T, l ledger.Ledger, _ *Clock) {
	plain := Entry(1)
	short := Entry(2)
	short.Serial = "7" // an odd number of digits
	bare := ledger.Entry{Serial: "ab", NotBefore: Start, NotAfter: Start.Add(time.Hour), Attestor: ledger.AttestorAuthority}
	outcomes := []ledger.Result{{Outcome: ledger.Issued, LeafHash: [32]byte{9}}, {Outcome: ledger.Failed}, {}}
	for i, want := range []ledger.Entry{plain, short, bare} {
		seq := record(t, l, want)
		if got, err := l.BySerial(t.Context(), want.Serial); err != nil || got.Outcome != ledger.Pending {
			t.Fatalf("before its result: %v, outcome %v", err, got.Outcome)
		}
		if outcomes[i].Outcome != ledger.Pending {
			l.Result(seq, outcomes[i])
		}
		want.Sequence, want.RecordedAt = seq, Start
		want.Outcome, want.LeafHash = outcomes[i].Outcome, outcomes[i].LeafHash
		got, err := l.BySerial(t.Context(), want.Serial)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got, cmpopts.EquateEmpty(), cmp.Comparer(func(a, b spiffeid.ID) bool { return a == b })); diff != "" {
			t.Errorf("row (-want +got):\n%s", diff)
		}
	}
	l.Result(1, ledger.Result{Outcome: ledger.Failed})
	if got, _ := l.BySerial(t.Context(), plain.Serial); got.Outcome != ledger.Issued {
		t.Errorf("a second result changed the first: %v", got.Outcome)
	}
}

func sequenceRises(t *testing.T, l ledger.Ledger, _ *Clock) {
	var last uint64
	for i := range 5 {
		seq := record(t, l, Entry(i))
		if seq <= last {
			t.Fatalf("sequence %d after %d", seq, last)
		}
		last = seq
	}
	if n, err := l.Rows(t.Context()); err != nil || n != 5 {
		t.Fatalf("rows %d, %v", n, err)
	}
}

func filters(t *testing.T, l ledger.Ledger, clock *Clock) {
	a := Entry(1)
	b := Entry(2)
	b.SPIFFEID = spiffeid.RequireFromString("spiffe://cluster.local/ns/shop/sa/payments")
	b.PodUID, b.Node, b.Attestor, b.IssuerKeyID = "pod-b", "node-2", "https://other.example", []byte("other issuer")
	record(t, l, a)
	clock.Set(Start.Add(time.Minute))
	record(t, l, b)
	for name, c := range map[string]struct {
		filter ledger.Filter
		want   []string
	}{
		"all":            {ledger.Filter{}, []string{a.Serial, b.Serial}},
		"serial":         {ledger.Filter{Serial: b.Serial}, []string{b.Serial}},
		"id":             {ledger.Filter{SPIFFEID: a.SPIFFEID}, []string{a.Serial}},
		"pod":            {ledger.Filter{PodUID: "pod-b"}, []string{b.Serial}},
		"node":           {ledger.Filter{Node: "node-1"}, []string{a.Serial}},
		"attestor":       {ledger.Filter{Attestor: "https://other.example"}, []string{b.Serial}},
		"subject key":    {ledger.Filter{SubjectKeyID: a.SubjectKeyID}, []string{a.Serial}},
		"issuer key":     {ledger.Filter{IssuerKeyID: b.IssuerKeyID}, []string{b.Serial}},
		"since":          {ledger.Filter{Since: Start.Add(time.Second)}, []string{b.Serial}},
		"since includes": {ledger.Filter{Since: Start.Add(time.Minute)}, []string{b.Serial}},
		"until excludes": {ledger.Filter{Until: Start.Add(time.Minute)}, []string{a.Serial}},
		"after":          {ledger.Filter{After: 1}, []string{b.Serial}},
		"limit":          {ledger.Filter{Limit: 1}, []string{a.Serial}},
		"joined by and":  {ledger.Filter{SPIFFEID: a.SPIFFEID, Node: "node-2"}, nil},
		"quote":          {ledger.Filter{Node: "' OR 1=1 --"}, nil},
	} {
		var got []string
		for _, e := range collect(t, l, c.filter) {
			got = append(got, e.Serial)
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%s: got %v, want %v", name, got, c.want)
		}
	}
}

func paging(t *testing.T, l ledger.Ledger, _ *Clock) {
	const n = 2600 // several pages, and more than an index may be behind
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			if _, err := l.Intent(t.Context(), Entry(i)); err != nil {
				t.Errorf("intent: %v", err)
			}
		})
	}
	wg.Wait()
	rows := collect(t, l, ledger.Filter{})
	if len(rows) != n {
		t.Fatalf("%d rows, want %d", len(rows), n)
	}
	for i, e := range rows {
		if e.Sequence != uint64(i)+1 {
			t.Fatalf("row %d has sequence %d", i, e.Sequence)
		}
	}
	for name, c := range map[string]struct {
		filter ledger.Filter
		want   int
	}{
		"limit":             {ledger.Filter{Limit: 600}, 600},
		"id":                {ledger.Filter{SPIFFEID: Entry(0).SPIFFEID}, n},
		"id and limit":      {ledger.Filter{SPIFFEID: Entry(0).SPIFFEID, Limit: 2100}, 2100},
		"id and after":      {ledger.Filter{SPIFFEID: Entry(0).SPIFFEID, After: 2000}, n - 2000},
		"pod and attestor":  {ledger.Filter{PodUID: Entry(0).PodUID, Attestor: Entry(0).Attestor}, n},
		"node and the past": {ledger.Filter{Node: Entry(0).Node, Until: Start}, 0},
	} {
		rows := collect(t, l, c.filter)
		if len(rows) != c.want || !slices.IsSortedFunc(rows, func(a, b ledger.Entry) int { return stdcmp.Compare(a.Sequence, b.Sequence) }) {
			t.Errorf("%s: %d rows, want %d, oldest first", name, len(rows), c.want)
		}
	}
	for _, i := range []int{0, n / 2, n - 1} {
		if e, err := l.BySerial(t.Context(), Entry(i).Serial); err != nil || e.Serial != Entry(i).Serial {
			t.Errorf("row %d by serial: %v", i, err)
		}
	}
	for _, err := range l.Query(t.Context(), ledger.Filter{}) {
		if err != nil {
			t.Error(err)
		}
		break // a consumer may stop early
	}
}

func notFound(t *testing.T, l ledger.Ledger, _ *Clock) {
	if _, err := l.BySerial(t.Context(), "abc"); !errors.Is(err, ledger.ErrNotFound) {
		t.Fatalf("error %v", err)
	}
	if rows := collect(t, l, ledger.Filter{}); len(rows) != 0 {
		t.Fatalf("rows %v", rows)
	}
}

func concurrent(t *testing.T, l ledger.Ledger, _ *Clock) {
	var mu sync.Mutex
	seen := map[uint64]bool{}
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			for range 20 {
				e := Entry(0)
				e.Serial = fmt.Sprintf("%x", rand.Text()[:12])
				seq, err := l.Intent(t.Context(), e)
				if err != nil {
					t.Errorf("intent: %v", err)
					return
				}
				l.Result(seq, ledger.Result{Outcome: ledger.Issued})
				mu.Lock()
				if seen[seq] {
					t.Errorf("sequence %d was given twice", seq)
				}
				seen[seq] = true
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	rows := collect(t, l, ledger.Filter{})
	if len(rows) != 320 {
		t.Fatalf("%d rows, want 320", len(rows))
	}
	for _, e := range rows {
		if e.Outcome != ledger.Issued {
			t.Fatalf("row %d: %v", e.Sequence, e.Outcome)
		}
	}
}

func cancelled(t *testing.T, l ledger.Ledger, _ *Clock) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	seq, err := l.Intent(ctx, Entry(1))
	// Either it was given up, or it had been taken and is durable; never an
	// error beside a row that stays unaccounted for.
	rows := collect(t, l, ledger.Filter{})
	if (err == nil) != (len(rows) == 1) {
		t.Fatalf("seq %d, error %v, rows %d", seq, err, len(rows))
	}
	if err != nil && !errors.Is(err, context.Canceled) {
		t.Fatalf("error %v", err)
	}
}

func badSerial(t *testing.T, l ledger.Ledger, _ *Clock) {
	for _, serial := range []string{"", "0", "0a"} {
		e := Entry(1)
		e.Serial = serial
		if _, err := l.Intent(t.Context(), e); err == nil {
			t.Errorf("serial %q was taken", serial)
		}
	}
}

func closed(t *testing.T, l ledger.Ledger, _ *Clock) {
	if err := l.Healthy(); err != nil {
		t.Fatalf("healthy: %v", err)
	}
	record(t, l, Entry(1))
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Intent(t.Context(), Entry(2)); !errors.Is(err, ledger.ErrUnavailable) {
		t.Fatalf("intent after close: %v", err)
	}
	if l.Healthy() == nil {
		t.Fatal("healthy after close")
	}
}
