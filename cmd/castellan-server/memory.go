package main

import (
	"context"
	"os"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

const (
	// garbageRoom is how much garbage may gather between collections while what is
	// alive is small. Signing makes short-lived garbage only, and collecting it as
	// often as the default does costs a tenth of the server's CPU.
	garbageRoom = 96 << 20
	// tuneEvery is how often the room is set anew for what is alive by then.
	tuneEvery = 10 * time.Second

	defaultGCPercent = 100
	maxGCPercent     = 1600
	minLive          = 4 << 20
)

// tuneCollector gives the collector room in bytes rather than as a share of what
// is alive: a small server collects seldom, a large one as Go does by default.
// GOGC and GOMEMLIMIT, where set, decide instead.
func tuneCollector(ctx context.Context) error {
	if os.Getenv("GOGC") != "" || os.Getenv("GOMEMLIMIT") != "" {
		<-ctx.Done()
		return ctx.Err()
	}
	live := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
	tick := time.NewTicker(tuneEvery)
	defer tick.Stop()
	for {
		metrics.Read(live)
		debug.SetGCPercent(gcPercent(live[0].Value.Uint64()))
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
}

// gcPercent is GOGC for so many bytes alive.
func gcPercent(live uint64) int {
	percent := garbageRoom * 100 / max(live, minLive)
	return int(min(max(percent, defaultGCPercent), maxGCPercent))
}
