package crowd

import (
	"net"
	"sync"
	"time"
)

// unreadFor is how long a peer may leave unread what is written to it.
const unreadFor = 10 * time.Second

// Paced returns c as a connection that is not read from while the peer leaves unread
// what is being written to it, and that fails if the peer does so for ten seconds. Who
// asks and reads no answer could else have those who answer keep answers without end:
// HTTP/2 keeps what was asked for meanwhile, and bounds by its streams and windows only
// what a peer has not given up.
func Paced(c net.Conn) net.Conn { return &paced{Conn: c} }

type paced struct {
	net.Conn
	writing sync.Mutex // held while something is being written
}

// Read waits for what is being written.
func (p *paced) Read(b []byte) (int, error) {
	p.writing.Lock()
	p.writing.Unlock() //nolint:staticcheck // nothing is guarded: it is waited for
	return p.Conn.Read(b)
}

// Write fails where the peer reads nothing for too long.
func (p *paced) Write(b []byte) (int, error) {
	p.writing.Lock()
	defer p.writing.Unlock()
	// Deadlines of connections are by the real clock.
	if err := p.SetWriteDeadline(time.Now().Add(unreadFor)); err != nil { //nolint:forbidigo // see above
		return 0, err
	}
	return p.Conn.Write(b)
}
