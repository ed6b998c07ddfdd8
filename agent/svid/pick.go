package svid

import (
	"cmp"
	"slices"
	"time"
)

// pick re-reads the clocks, shows what has expired (or is valid again), and
// takes the due identities there is room for.
func (r *Rotator) pick() []*entry {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := r.moment()
	var due []*entry
	for _, e := range r.entries {
		if shown, _ := e.source.Current(); shown.Status != e.status(now.wall) {
			r.publish(e)
			if e.status(now.wall) == Expired && !e.due.reached(now) && e.due.elapsed-now.elapsed > startingWait {
				e.due = now.after(startingWait) // the wait was planned while there was something to serve
			}
		}
		if !e.inFlight && e.due.reached(now) {
			due = append(due, e)
		}
	}
	slices.SortFunc(due, order)
	var picked []*entry
	for _, e := range due {
		if r.room(e) {
			e.inFlight, e.unproved = true, !e.proved()
			r.busy++
			if e.unproved {
				r.unproved++
			}
			picked = append(picked, e)
		}
	}
	return picked
}

// proved holds where the last attempt was answered with a certificate.
func (e *entry) proved() bool { return e.svid != nil && e.failures == 0 }

// room reports whether e may be asked for now. What is new or failed before does
// not get every place: were it to hang each time, it would hold them all, and
// what can be renewed would expire. Caller holds r.mu.
func (r *Rotator) room(e *entry) bool {
	if r.busy >= r.cfg.Concurrency {
		return false
	}
	return e.proved() || r.unproved < r.cfg.Concurrency-r.cfg.Concurrency/4
}

// order puts nearest expiry first. Those that failed before come after, each in
// its turn: by expiry alone, what never had a certificate would always be first.
func order(a, b *entry) int {
	if failed := cmp.Compare(min(a.failures, 1), min(b.failures, 1)); failed != 0 {
		return failed
	}
	if a.failures > 0 {
		return cmp.Or(cmp.Compare(a.due.elapsed, b.due.elapsed), cmp.Compare(a.expiry(), b.expiry()))
	}
	return cmp.Compare(a.expiry(), b.expiry())
}

// expiry orders entries: those without anything to serve come first.
func (e *entry) expiry() int64 {
	if e.svid == nil {
		return 0
	}
	return e.svid.NotAfter.UnixNano()
}

// sleep returns when to look again.
func (r *Rotator) sleep() time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := r.moment()
	wait := longestSleep
	for _, e := range r.entries {
		if e.svid != nil {
			wait = min(wait, max(e.life/20, shortestWatch))
			if left := e.svid.NotAfter.Sub(now.wall); left > 0 {
				wait = min(wait, left)
			}
		}
		// With no room, the end of a call wakes the scheduler.
		if !e.inFlight && r.room(e) {
			wait = min(wait, e.due.elapsed-now.elapsed)
		}
	}
	return max(wait, shortestSleep)
}
