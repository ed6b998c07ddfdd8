package svid

import (
	"math/rand/v2"
	"time"

	"castellan.dev/agent/caclient"
)

// The scheduler lives by two clocks. The wall clock says what has expired, for
// that is what peers go by; the monotonic one says how long ago something was
// done, and cannot be stepped. What is due by either is due: stepping the clock
// back does not delay a renewal, stepping it forward brings it on at once.
type moment struct {
	wall    time.Time     // without a monotonic reading
	elapsed time.Duration // since the rotator was made
}

func (m moment) after(d time.Duration) moment {
	return moment{wall: m.wall.Add(d), elapsed: m.elapsed + d}
}

// reached reports whether now is at or past m by either clock.
func (m moment) reached(now moment) bool {
	return now.elapsed >= m.elapsed || !now.wall.Before(m.wall)
}

// halfLife returns how long after its issue a certificate is renewed: half of
// what it has to live, ± 10 % so that those issued together are not renewed
// together. random is in [0, 1).
func halfLife(lifetime time.Duration, random float64) time.Duration {
	// The floor keeps an answer with hardly any life left from making a loop.
	return max(time.Duration(float64(lifetime)/2*(0.9+0.2*random)), shortestRenewal)
}

// Bounds of the waits after a failure.
const (
	firstWait      = 250 * time.Millisecond
	firstSlowWait  = 2 * time.Second
	longestWait    = 30 * time.Second
	longestSlow    = time.Minute
	startingWait   = 5 * time.Second // longest wait while there is nothing to serve
	callTimeout    = 10 * time.Second
	minCallTimeout = 2 * time.Second
)

// retryWait returns how long to wait after the failures-th failure in a row.
// lifetime is that of the certificate being renewed, zero if there is none:
// short-lived ones are tried more often, so that one failure is not the end.
func retryWait(err error, failures int, lifetime time.Duration, random float64) time.Duration {
	first, longest := firstWait, longestWait
	switch {
	case lifetime > 0:
		longest = min(max(lifetime/20, time.Second), longest)
	default:
		longest = startingWait
	}
	switch caclient.KindOf(err) {
	case caclient.Refused, caclient.Invalid, caclient.BadAnswer:
		first, longest = firstSlowWait, longestSlow
		if lifetime > 0 {
			longest = min(max(lifetime/10, firstSlowWait), longest)
		}
	}
	wait := longest
	if n := failures - 1; n < 16 {
		wait = min(first<<n, longest)
	}
	wait = time.Duration(float64(wait) * (0.75 + 0.5*random))
	// What the server asked for is a lower bound, with some spread on top.
	if asked := caclient.RetryAfter(err); asked > wait {
		wait = asked + time.Duration(float64(asked)*0.1*random)
	}
	return wait
}

// timeout bounds one call. With little life left a call that hangs must leave
// time for another.
func timeout(left time.Duration, has bool) time.Duration {
	if !has {
		return callTimeout
	}
	return min(max(left*6/10, minCallTimeout), callTimeout)
}

// Bounds of the scheduler's sleep: it looks at the clocks again this often even
// when nothing is due, because the wall clock may have been stepped.
const (
	longestSleep  = time.Minute
	shortestSleep = 10 * time.Millisecond
	shortestWatch = 250 * time.Millisecond

	shortestRenewal = time.Second
)

func random() float64 { return rand.Float64() }
