package server

import (
	"errors"
	"sync"
	"time"
)

// Limits bound signing: token buckets per attested pod and kind of identity, and
// overall. Zero fields mean the defaults.
type Limits struct {
	PodBurst       int     // default 100
	PodPerSecond   float64 // default 2
	TotalBurst     int     // default 20000
	TotalPerSecond float64 // default 5000
}

// maxBuckets bounds the remembered buckets. Only those that asked within the last
// seconds need one: a full bucket is forgotten.
const maxBuckets = 1 << 17

// bucket holds the rate in the form of GCRA: a token bucket whose whole state is
// the time at which it will be full again.
type bucket struct {
	interval time.Duration // per request
	depth    time.Duration // interval times burst
}

func newBucket(burst int, perSecond float64) bucket {
	interval := time.Duration(float64(time.Second) / perSecond)
	return bucket{interval: interval, depth: time.Duration(burst) * interval}
}

// next returns the state after one more request, or how long to wait.
func (b bucket) next(full, now int64) (int64, time.Duration) {
	after := max(full, now) + int64(b.interval)
	return after, time.Duration(after - now - int64(b.depth))
}

// podKind has a bucket: a workload that asks for one JWT-SVID after the other does
// not use up what its certificates are renewed from.
type podKind struct {
	pod  string
	kind kind
}

// limiter is safe for concurrent use.
type limiter struct {
	pod, total bucket

	mu        sync.Mutex
	totalFull int64
	podFull   map[podKind]int64 // nanoseconds
	sweepAt   int
	latest    int64
}

func newLimiter(l Limits) (*limiter, error) {
	if l.PodBurst < 0 || l.TotalBurst < 0 || l.PodPerSecond < 0 || l.TotalPerSecond < 0 {
		return nil, errors.New("server: rate limits must not be negative")
	}
	def := func(n, d int) int {
		if n == 0 {
			return d
		}
		return n
	}
	rate := func(n, d float64) float64 {
		if n == 0 {
			return d
		}
		return n
	}
	return &limiter{
		pod:     newBucket(def(l.PodBurst, 100), rate(l.PodPerSecond, 2)),
		total:   newBucket(def(l.TotalBurst, 20000), rate(l.TotalPerSecond, 5000)),
		podFull: map[podKind]int64{},
		sweepAt: 1024,
	}, nil
}

// take counts one request of pod for an identity of kind k. When it is over a limit it counts nothing and
// returns which one ("pod" or "total") and how long to wait.
func (l *limiter) take(uid string, k kind, at time.Time) (wait time.Duration, scope string) {
	now, pod := at.UnixNano(), podKind{uid, k}
	l.mu.Lock()
	defer l.mu.Unlock()
	// A clock that steps back must not lock anybody out until it catches up:
	// buckets then start over.
	if now < l.latest-int64(time.Minute) {
		clear(l.podFull)
		l.totalFull = 0
	}
	l.latest = now
	l.sweep(now)
	podFull, known := l.podFull[pod]
	podAfter, wait := l.pod.next(podFull, now)
	if wait > 0 {
		return wait, "pod"
	}
	if !known && len(l.podFull) >= maxBuckets {
		// Fails closed: as many pods as that at once are a flood.
		return l.pod.interval, "total"
	}
	totalAfter, wait := l.total.next(l.totalFull, now)
	if wait > 0 {
		return wait, "total"
	}
	l.podFull[pod], l.totalFull = podAfter, totalAfter
	return 0, ""
}

// sweep forgets full buckets whenever their number has doubled.
func (l *limiter) sweep(now int64) {
	if len(l.podFull) < l.sweepAt {
		return
	}
	for pod, full := range l.podFull {
		if full <= now {
			delete(l.podFull, pod)
		}
	}
	l.sweepAt = min(maxBuckets, max(1024, 2*len(l.podFull)))
}
