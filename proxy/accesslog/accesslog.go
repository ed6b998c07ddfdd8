// Package accesslog writes one JSON object per request or TCP connection.
//
// Adding an entry costs some hundred nanoseconds and never waits: entries are
// formatted into memory and written by Run every FlushInterval. What a slow
// writer cannot take is dropped and counted, never queued without bound. Queries
// are not logged, since they may carry tokens; nor are headers but the two ids
// named here. Strings of peers are escaped and shortened.
package accesslog

import (
	"context"
	"io"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// FlushInterval is how long an entry may wait in memory.
	FlushInterval = 200 * time.Millisecond
	// flushBytes wakes the writer before its time.
	flushBytes = 64 << 10
	// maxBytes bounds what waits while the writer is slow.
	maxBytes = 1 << 20
)

// Log collects entries and writes them. A nil *Log takes entries and drops them.
type Log struct {
	w       io.Writer
	wake    chan struct{}
	dropped atomic.Uint64

	mu    sync.Mutex
	buf   []byte
	spare []byte
	clock stamp
}

// New returns a Log that writes to w once Run runs.
func New(w io.Writer) *Log {
	return &Log{w: w, wake: make(chan struct{}, 1)}
}

// Add takes one entry. It does not keep the entry or its strings.
func (l *Log) Add(e *Entry) {
	if l == nil {
		return
	}
	l.mu.Lock()
	if len(l.buf) >= maxBytes {
		l.mu.Unlock()
		l.dropped.Add(1)
		return
	}
	before := len(l.buf)
	l.buf = e.append(l.buf, &l.clock)
	full := before < flushBytes && len(l.buf) >= flushBytes
	l.mu.Unlock()
	if full {
		select {
		case l.wake <- struct{}{}:
		default:
		}
	}
}

// Dropped is how many entries were lost: to a writer that was too slow, or that failed.
func (l *Log) Dropped() uint64 {
	if l == nil {
		return 0
	}
	return l.dropped.Load()
}

// Run writes what was added until ctx ends, and then what is left.
func (l *Log) Run(ctx context.Context) error {
	if l == nil {
		<-ctx.Done()
		return nil
	}
	tick := time.NewTicker(FlushInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			l.Flush()
			return nil
		case <-tick.C:
		case <-l.wake:
		}
		l.Flush()
	}
}

// Flush writes what was added until now. Run calls it; whoever calls it besides
// does so after Run has returned.
func (l *Log) Flush() {
	if l == nil {
		return
	}
	l.mu.Lock()
	out := l.buf
	l.buf, l.spare = l.spare[:0], nil
	l.mu.Unlock()
	if len(out) > 0 {
		if _, err := l.w.Write(out); err != nil {
			// Where the log cannot be written there is nowhere to say so but a metric.
			l.dropped.Add(lines(out))
		}
	}
	if cap(out) > 2*flushBytes {
		out = nil // a burst's buffer is not kept
	}
	l.mu.Lock()
	l.spare = out[:0]
	l.mu.Unlock()
}

func lines(b []byte) (n uint64) {
	for _, c := range b {
		if c == '\n' {
			n++
		}
	}
	return n
}
