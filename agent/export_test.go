package agent

import "time"

// The socket's bounds, and what shortens the waits for tests.
const (
	MaxStreams     = maxStreams
	MaxUnary       = maxUnary
	StreamsPerConn = streamsPerConn
	MaxMessage     = maxMessage
	MaxHeaders     = maxHeaders
	MaxHeld        = maxHeld
	MaxEnding      = maxEnding
	MaxHeldByPod   = maxHeldByPod
	ConnCost       = connCost
	CallCost       = callCost
)

// SetDeadlines must be called before Run.
func (a *Agent) SetDeadlines(first, unary time.Duration) {
	a.deadlines = deadlines{first: first, unary: unary}
}

// Held is what counts as held by all pods, by connections that were cut, and of how
// many pods there are connections.
func (a *Agent) Held() (held, ending int64, pods int) {
	a.room.mu.Lock()
	defer a.room.mu.Unlock()
	return a.room.held, a.room.ending, len(a.room.tenants)
}

// HeldMost is what the pod counts that holds most.
func (a *Agent) HeldMost() int64 {
	a.room.mu.Lock()
	defer a.room.mu.Unlock()
	most := int64(0)
	for t := range a.room.tenants {
		most = max(most, t.held)
	}
	return most
}
