package server

// SetUnproved changes the bounds of calls without a proof, until the returned function is called.
func (g *Gate) SetUnproved(total, perSource int) func() {
	old := g.unproved
	g.unproved = newSlots(total, perSource)
	return func() { g.unproved = old }
}
