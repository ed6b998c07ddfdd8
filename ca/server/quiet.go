package server

import (
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Bounds of log lines that anybody can cause: so many of one reason at once, then
// one every so often. The ledger may be on the same disk as the log, and a ledger
// that cannot be written stops signing.
const (
	quietBurst = 50
	quietEvery = 10 * time.Second
	// quietReasons bounds the reasons told apart; they are constants, so a greater
	// number is a fault, and shares one bucket.
	quietReasons = 256
)

// quiet says which of the refusals are written to the log. Metrics count each.
type quiet struct {
	now  func() time.Time
	left prometheus.Counter

	mu      sync.Mutex
	reasons map[string]*quietReason
}

type quietReason struct {
	bucket     int64 // when it is full again, as limiter keeps it
	suppressed uint64
}

func newQuiet(now func() time.Time, left prometheus.Counter) *quiet {
	return &quiet{now: now, left: left, reasons: map[string]*quietReason{}}
}

// allow reports whether a line of this reason is written now, and how many were
// left out since the last.
func (q *quiet) allow(reason string) (suppressed uint64, ok bool) {
	now := q.now().UnixNano()
	b := bucket{interval: quietEvery, depth: quietBurst * quietEvery}
	q.mu.Lock()
	defer q.mu.Unlock()
	r := q.reasons[reason]
	if r == nil {
		if len(q.reasons) >= quietReasons {
			reason = ""
		}
		if r = q.reasons[reason]; r == nil {
			r = &quietReason{}
			q.reasons[reason] = r
		}
	}
	if r.bucket > now+int64(b.depth) {
		r.bucket = 0 // the clock stepped back
	}
	after, wait := b.next(r.bucket, now)
	if wait > 0 {
		r.suppressed++
		q.left.Inc()
		return 0, false
	}
	r.bucket = after
	suppressed, r.suppressed = r.suppressed, 0
	return suppressed, true
}
