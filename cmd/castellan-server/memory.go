package main

import (
	"context"
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
)

const (
	// garbageRoom is how much garbage may gather between collections while what is
	// alive is small. Signing makes short-lived garbage only, and collecting it as
	// often as the default does costs a tenth of the server's CPU.
	garbageRoom      = 96 << 20
	defaultGCPercent = 100
	maxGCPercent     = 1600
	minLive          = 4 << 20
)

// tuneCollector gives the collector room in bytes rather than as a share of what
// is alive: a small server collects seldom, a large one as Go does by default.
// GOGC and GOMEMLIMIT, where set, decide instead.
//
// The room is set anew after every collection. Any later would be too late: a
// server that reads a large cluster has a hundred times as much alive within a
// second, and a share that was right for little is then hundreds of megabytes.
func tuneCollector(ctx context.Context) error {
	if os.Getenv("GOGC") != "" || os.Getenv("GOMEMLIMIT") != "" {
		<-ctx.Done()
		return ctx.Err()
	}
	before := debug.SetGCPercent(gcPercent(minLive))
	defer debug.SetGCPercent(before)
	afterCollections(ctx, func() {
		live := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
		metrics.Read(live)
		debug.SetGCPercent(gcPercent(live[0].Value.Uint64()))
	})
	<-ctx.Done()
	return ctx.Err()
}

// collection is garbage as soon as it is made, so that each collection finds it.
// Its pointer keeps it from sharing a block with what lives.
type collection struct{ _ *collection }

// afterCollections calls f after every collection until ctx ends.
func afterCollections(ctx context.Context, f func()) {
	var next func(*collection)
	next = func(c *collection) {
		if ctx.Err() == nil {
			f()
			runtime.SetFinalizer(c, next) // for the next one
		}
	}
	runtime.SetFinalizer(&collection{}, next)
}

// gcPercent is GOGC for so many bytes alive.
func gcPercent(live uint64) int {
	percent := garbageRoom * 100 / max(live, minLive)
	return int(min(max(percent, defaultGCPercent), maxGCPercent))
}
