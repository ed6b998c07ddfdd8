package xds_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"castellan.dev/internal/xds"
)

// TestConverges: whatever changes, is refused and is cut off on the way, a client
// ends up with exactly what the server has, and the server knows it.
func TestConverges(t *testing.T) {
	for seed := range uint64(8) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			rnd := rand.New(rand.NewPCG(seed, 0))
			s := start(t, func(c *xds.Config) { c.Limits.ResponseBytes = 300 })
			var mu sync.Mutex
			var cut context.CancelFunc
			open := func(ctx context.Context) (xds.DeltaClientStream, error) {
				ctx, cancel := context.WithCancel(ctx)
				mu.Lock()
				cut = cancel
				mu.Unlock()
				return s.open(ctx)
			}
			c, f := follow(t, open, nil)
			f.mu.Lock()
			f.refuse = "bad"
			f.mu.Unlock()
			names := []string{"a", "b", "c", "d", "e", "f", "g", "h"}
			held := map[string]string{}
			publish := func() {
				var pairs []string
				for name, v := range held {
					pairs = append(pairs, name+"="+v)
				}
				s.set(t, pairs...)
			}
			for step := range 200 {
				name := names[rnd.IntN(len(names))]
				switch rnd.IntN(10) {
				case 0:
					held[name] = "bad"
				case 1, 2:
					delete(held, name)
				case 3:
					mu.Lock()
					if cut != nil {
						cut()
					}
					mu.Unlock()
				case 4:
					c.SetNames(typeA, [][]string{nil, names[:4], {}}[rnd.IntN(3)])
				default:
					held[name] = fmt.Sprint(step)
				}
				publish()
			}
			for name, v := range held {
				if v == "bad" {
					held[name] = "good"
				}
			}
			publish()
			c.SetNames(typeA, nil)
			want := []string{}
			for name, v := range held {
				want = append(want, name+"="+v)
			}
			slices.Sort(want)
			eventually(t, fmt.Sprint("state ", want), f.is(want...))
			for _, p := range want {
				eventually(t, "acknowledgement of "+p, func() bool {
					return slices.ContainsFunc(s.recorder.Records(), func(r xds.Record) bool {
						return r.Name == p[:1] && r.Acked == version(t, p[2:]) && r.Nacked == ""
					})
				})
			}
			mu.Lock()
			cut()
			mu.Unlock()
		})
	}
}
