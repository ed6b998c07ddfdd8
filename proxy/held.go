package proxy

import "math"

// A connection that is idle costs little, and one whose client opens a hundred streams
// and takes no answers costs megabytes: so what requests in flight hold is counted over
// all connections, and whoever holds most pays first. Connections count for themselves
// and tell of it by additions only; the lock is taken where there is too much.

// left is what a place holds that was given up, far below what can be added to it.
const left = math.MinInt64 / 2

// holds: the requests in flight of p hold delta bytes more. It is called without a lock.
func (p *place) holds(delta int64) {
	if p.held.Add(delta) < left/2 {
		return // what it held has been taken off
	}
	if l := p.limits; l.held.Add(delta) > l.budget && delta > 0 {
		for _, cut := range l.shed() {
			cut()
		}
	}
}

// cuts says how to close p.
func (p *place) cuts(cut func()) {
	p.limits.mu.Lock()
	defer p.limits.mu.Unlock()
	p.cut = cut
}

// shed gives up places until what is held is within the budget: those that hold most, of
// the source that holds most. Looking for them costs, so that that source goes on losing
// until there is some room, as long as nobody holds more.
func (l *limits) shed() (cuts []func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	var first *sourceLimits
	for len(cuts) < atOnce && l.held.Load() > l.budget-l.budget/16 {
		s, p := l.greediest()
		over := l.held.Load() > l.budget
		if p == nil || !over && (first == nil || s != first) {
			break
		}
		first = s
		p.leave()
		cuts = append(cuts, p.cut)
	}
	return cuts
}

// greediest is the source whose requests hold most, and that of its connections which
// holds most; of two that hold the same, the one without a certificate.
func (l *limits) greediest() (most *sourceLimits, worst *place) {
	var mostHeld int64
	for _, s := range l.sources {
		var sum int64
		var p *place
		for e := s.settled.Front(); e != nil; e = e.Next() {
			one, _ := e.Value.(*place)
			if one.cut == nil {
				continue
			}
			sum += one.held.Load()
			if p == nil || one.held.Load() > p.held.Load() || one.held.Load() == p.held.Load() && p.proved && !one.proved {
				p = one
			}
		}
		if sum > mostHeld {
			most, worst, mostHeld = s, p, sum
		}
	}
	return most, worst
}

// shed closes a connection whose requests hold too much. Peers can cause it at will, so
// that the log is spared.
func (p *Proxy) shed(l *live) {
	if l.because(closedMemory) {
		p.metrics.closed.WithLabelValues(l.side.String(), closedMemory).Inc()
		if p.quiet.AllowN(p.now(), 1) {
			p.log.Warn("live connection closed", "direction", l.side.String(), "reason", closedMemory,
				"peer", l.peer.ID.String(), "source", l.subject.SourceIP.String())
		}
	}
	l.closeNow()
}
