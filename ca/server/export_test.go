package server

import "castellan.dev/internal/crowd"

// SetUnproved changes the bounds of calls without a proof, until the returned function is called.
func (g *Gate) SetUnproved(total, perSource int) func() {
	old := g.calls
	g.calls = crowd.NewPlaces(crowd.Bounds{Total: total, PerSource: perSource})
	return func() { g.calls = old }
}
