package kube

import (
	"context"
	"time"
)

const (
	// still is how long nothing must have changed before a new reading is made, and
	// stillMost how long after the first change it is made all the same.
	still     = 20 * time.Millisecond
	stillMost = 100 * time.Millisecond
)

// pacer makes one reading of many changes.
type pacer chan struct{}

func newPacer() pacer { return make(pacer, 1) }

// announce says that there is something to read.
func (p pacer) announce() {
	select {
	case p <- struct{}{}:
	default:
	}
}

// wait returns true when there is; false at the end of ctx.
func (p pacer) wait(ctx context.Context) bool {
	select {
	case <-ctx.Done():
		return false
	case <-p:
		return true
	}
}

// quiet waits until changes stop coming, or have come for long enough.
func (p pacer) quiet(ctx context.Context) {
	most := time.NewTimer(stillMost)
	defer most.Stop()
	quiet := time.NewTimer(still)
	defer quiet.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-most.C:
			return
		case <-quiet.C:
			return
		case <-p:
			quiet.Reset(still)
		}
	}
}
