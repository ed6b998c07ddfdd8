package agent

import (
	"context"
	"net"
	"sync"
	"time"

	"castellan.dev/internal/crowd"
)

// Bounds of what the clients of all pods together can make the agent hold. Its
// container has 256 MiB, of which the heap leaves a seventh (cmd/castellan-agent):
// 217 MiB are for some 40 of its own, 45 of what 2000 volumes take (19 KiB for a
// socket, 13 for a pod), and 112 here; 20 are left. A connection and a call count
// what they cost at most, messages in both directions while they are held.
//
// A node full of pods, 250 with two connections and ten calls each, counts
// 250 x (2 x 64 + 10 x 24) KiB = 90 MiB, of which it uses less.
const (
	maxHeld = 104 << 20
	// maxEnding is what connections that were cut may still hold besides.
	maxEnding = 8 << 20
	// maxHeldByPod: all sockets of it together.
	maxHeldByPod = 8 << 20
	// fairShare is never taken from a pod: 256 of them have 96 MiB. It is the full
	// node's two connections and ten calls, and 16 KiB.
	fairShare = 384 << 10

	// connCost: a frame and a block of headers being read (16 KiB each), what is
	// written and not read (8, and 16 in the kernel), tables of HPACK, three stacks.
	connCost = 64 << 10
	// callCost: its headers, five stacks.
	callCost = 24 << 10
	// frameCost is what a frame or an element takes besides its bytes.
	frameCost = 128
	// sendBuffer is the kernel's, which counts as the agent's memory and doubles it.
	sendBuffer = 8 << 10

	// sendPatience is how long a message to a client waits for others to be read
	// before room is made for it.
	sendPatience = time.Second
)

// room is what all clients may take up. Where it is short, who holds least comes
// first: a pod within its fair share is always let in, and connections give place
// of the namespace whose pods hold most beyond their shares, and there of the pod
// that holds most. So neither one pod nor many of a namespace keep others out.
type room struct {
	refused func(reason string)

	mu sync.Mutex
	// held is what counts, ending what connections that were cut still hold.
	held, ending int64
	tenants      map[*tenant]struct{} // those with connections
	freed        chan struct{}        // closed when something was given back; nil if nobody waits
}

func newRoom(refused func(string)) *room {
	return &room{refused: refused, tenants: map[*tenant]struct{}{}}
}

// tenant is one pod, or one workload of the configuration, with all its sockets.
type tenant struct {
	room      *room
	namespace string
	streams   places
	unary     places

	// Guarded by room.mu.
	held  int64
	conns map[*conn]struct{}
}

func (r *room) tenant(namespace string) *tenant {
	return &tenant{
		room: r, namespace: namespace, conns: map[*conn]struct{}{},
		streams: places{limit: maxStreams}, unary: places{limit: maxUnary},
	}
}

// How long a pod within its fair share waits for what is being cut: with a connection
// that it has, and with one that it opens, for which the whole socket waits.
const (
	endingPatience = 10 * time.Second
	acceptPatience = time.Second
)

// takeSoon is take for a connection that may wait: where only connections that are
// being cut are in the way of a pod within its fair share, they soon are not. It is
// called with the room locked, and unlocks it meanwhile.
func (c *conn) takeSoon(n int64, patience time.Duration) bool {
	r := c.tenant.room
	var late <-chan time.Time
	for !c.take(n, true) {
		if c.cut || c.closed || c.tenant.held+n > fairShare {
			return false
		}
		if late == nil {
			timer := time.NewTimer(patience)
			defer timer.Stop()
			late = timer.C
		}
		freed := r.whenFreed()
		r.mu.Unlock()
		select {
		case <-freed:
			r.mu.Lock()
		case <-late:
			r.mu.Lock()
			return false
		}
	}
	return true
}

// whenFreed is closed when something is given back.
func (r *room) whenFreed() <-chan struct{} {
	if r.freed == nil {
		r.freed = make(chan struct{})
	}
	return r.freed
}

// beyond is what a pod holds more than nobody takes from it.
func beyond(held int64) int64 { return max(held-fairShare, 0) }

// take counts n bytes more for c, and cuts others' connections if there is no room
// otherwise and evict is set; false if nothing was counted.
func (c *conn) take(n int64, evict bool) bool {
	r, t := c.tenant.room, c.tenant
	if c.cut || c.closed {
		return false
	}
	for t.held+n > maxHeldByPod {
		big := t.largest()
		if !evict || big == nil || big.held <= c.held+n {
			return false
		}
		big.end()
	}
	for r.held+n > maxHeld {
		most := r.most(t, n)
		if !evict || most == nil {
			return false
		}
		most.largest().end()
	}
	if r.held+r.ending+n > maxHeld+maxEnding {
		return false
	}
	r.held, t.held, c.held = r.held+n, t.held+n, c.held+n
	return true
}

// most returns the pod that has to give place to t's holding n more, if any.
func (r *room) most(t *tenant, n int64) *tenant {
	namespaces := map[string]int64{}
	for o := range r.tenants {
		namespaces[o.namespace] += beyond(o.held)
	}
	mine := namespaces[t.namespace] - beyond(t.held) + beyond(t.held+n)
	var most *tenant
	for o := range r.tenants {
		theirs := namespaces[o.namespace]
		switch {
		case o == t || o.held <= fairShare:
			continue
		case t.held+n <= fairShare:
		case o.namespace == t.namespace && o.held <= t.held+n:
			continue
		case o.namespace != t.namespace && theirs <= mine:
			continue
		}
		if most == nil || theirs > namespaces[most.namespace] || o.namespace == most.namespace && o.held > most.held {
			most = o
		}
	}
	return most
}

// largest returns the connection that holds most.
func (t *tenant) largest() *conn {
	var largest *conn
	for c := range t.conns {
		if largest == nil || c.held > largest.held {
			largest = c
		}
	}
	return largest
}

// end cuts c. What it holds counts until it is given back, but for nobody.
func (c *conn) end() {
	r := c.tenant.room
	c.cut = true
	r.held, r.ending = r.held-c.held, r.ending+c.held
	c.tenant.held -= c.held
	c.tenant.drop(c)
	_ = c.Conn.Close() // whoever reads from it finds out
	r.refused("room")
	r.wake() // it may be waiting itself
}

// wake has those look again who wait for room.
func (r *room) wake() {
	if r.freed != nil {
		close(r.freed)
		r.freed = nil
	}
}

func (t *tenant) drop(c *conn) {
	delete(t.conns, c)
	if len(t.conns) == 0 {
		delete(t.room.tenants, t)
	}
}

// give takes back what take counted.
func (c *conn) give(n int64) {
	r := c.tenant.room
	c.held -= n
	if c.cut {
		r.ending -= n
	} else {
		r.held, c.tenant.held = r.held-n, c.tenant.held-n
		if c.held == 0 {
			c.tenant.drop(c)
		}
	}
	r.wake()
}

// wait counts n bytes more for c once there is room, and makes some after a while.
func (c *conn) wait(ctx context.Context, n int64, counted func()) error {
	r := c.tenant.room
	patience := time.NewTimer(sendPatience)
	defer patience.Stop()
	evict := false
	for {
		r.mu.Lock()
		if c.take(n, evict || c.tenant.held+n <= fairShare) {
			counted()
			r.mu.Unlock()
			return nil
		}
		freed := r.whenFreed()
		r.mu.Unlock()
		select {
		case <-freed:
		case <-patience.C:
			evict = true
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// enter counts a connection; nil if there is no room for it.
func (t *tenant) enter(raw net.Conn) *conn {
	c := &conn{Conn: crowd.Paced(raw), tenant: t, calls: map[uint32]*call{}}
	c.in.skip = prefaceSize
	t.room.mu.Lock()
	defer t.room.mu.Unlock()
	if !c.takeSoon(connCost, acceptPatience) {
		return nil
	}
	t.conns[c] = struct{}{}
	t.room.tenants[t] = struct{}{}
	return c
}

// counted is a pod's socket, whose connections take room.
type counted struct {
	net.Listener
	tenant *tenant
}

// Accept closes those that there is no room for.
func (l counted) Accept() (net.Conn, error) {
	for {
		raw, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if b, ok := raw.(interface{ SetWriteBuffer(int) error }); ok {
			_ = b.SetWriteBuffer(sendBuffer) // the kernel's default is larger, nothing else
		}
		if c := l.tenant.enter(raw); c != nil {
			return c, nil
		}
		_ = raw.Close() // refused: there is nobody to tell
		l.tenant.room.refused("room")
	}
}
