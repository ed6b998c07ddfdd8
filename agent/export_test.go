package agent

import "time"

// The socket's bounds, and what shortens the waits for tests.
const (
	MaxStreams     = maxStreams
	MaxUnary       = maxUnary
	StreamsPerConn = streamsPerConn
	MaxMessage     = maxMessage
	MaxHeaders     = maxHeaders
)

// SetDeadlines must be called before Run.
func (a *Agent) SetDeadlines(first, unary time.Duration) {
	a.deadlines = deadlines{first: first, unary: unary}
}
