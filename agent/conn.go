package agent

import (
	"context"
	"errors"
	"net"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/stats"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// conn is a client's connection. It looks at the frames that pass, for what they
// make the agent hold: gRPC keeps what has arrived of a message until it is whole,
// however long that takes, in its streams' windows and beyond.
type conn struct {
	net.Conn
	tenant *tenant

	in, out frames
	// opened is the last stream that headers were read of. gRPC reads a frame at a
	// time (ReadBufferSize 0), so that it is the one whose call is admitted.
	opened uint32

	// Guarded by room.mu.
	held        int64
	calls       map[uint32]*call // by stream
	cut, closed bool
}

var errNoRoom = errors.New("this pod's clients, or those of all pods, make the agent hold too much")

// Read counts what arrives, and fails where there is no room for it.
func (c *conn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if !c.in.pass(p[:n], c.received) {
		c.tenant.room.refused("room")
		return 0, errNoRoom
	}
	return n, err
}

// Write counts off what is sent.
func (c *conn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	c.out.pass(p[:n], c.sent)
	return n, err
}

// Close gives back what the connection itself took, once, and what nobody will read.
func (c *conn) Close() error {
	c.tenant.room.mu.Lock()
	if !c.closed {
		c.closed = true
		c.give(connCost)
		for _, b := range c.calls {
			b.reset()
		}
	}
	c.tenant.room.mu.Unlock()
	return c.Conn.Close()
}

func (c *conn) received(f frame) bool {
	if f.kind == frameHeaders {
		c.opened = f.stream
		return true
	}
	c.tenant.room.mu.Lock()
	defer c.tenant.room.mu.Unlock()
	b := c.calls[f.stream]
	if b == nil {
		return true // gRPC drops it
	}
	switch f.kind {
	case frameReset:
		b.reset()
	case frameData:
		cost := bufferFor(f.size)
		if !c.takeSoon(cost, endingPatience) {
			return false
		}
		if c.calls[f.stream] != b { // it ended meanwhile
			c.give(cost)
			return true
		}
		b.unread += f.size
		b.buffers += cost
	}
	return true
}

// bufferFor is what gRPC takes for a frame's data.
func bufferFor(size int64) int64 {
	switch {
	case size > 4<<10:
		size = 16 << 10
	case size > 1<<10:
		size = 4 << 10
	}
	return frameCost + size
}

func (c *conn) sent(f frame) bool {
	c.tenant.room.mu.Lock()
	defer c.tenant.room.mu.Unlock()
	b := c.calls[f.stream]
	if b == nil {
		return true
	}
	switch f.kind {
	case frameReset:
		b.reset()
	case frameData:
		n := min(f.size, b.unsent)
		b.unsent -= n
		c.give(n)
		if b.ended && b.unsent == 0 {
			b.drop()
		}
	}
	return true
}

// call is one call's part of what its connection holds, guarded by room.mu.
type call struct {
	conn   *conn
	stream uint32
	many   bool // it takes more than one message
	// first is the clock that its first message runs against; nil for unary calls.
	first *time.Timer
	// unread bytes have arrived and are not decoded; buffers is what they cost.
	unread, buffers int64
	// kept is what is remembered of messages until the call ends.
	kept int64
	// named: the client's name is among it.
	named bool
	// unsent bytes wait for the client to read.
	unsent int64
	ended  bool
}

// begin counts the call whose headers were read last; nil if there is no room.
func (c *conn) begin(many bool) *call {
	c.tenant.room.mu.Lock()
	defer c.tenant.room.mu.Unlock()
	if c.calls[c.opened] != nil || !c.takeSoon(callCost, endingPatience) {
		return nil
	}
	b := &call{conn: c, stream: c.opened, many: many}
	c.calls[c.opened] = b
	return b
}

// end gives back what the handler had. Its answer may still wait for the client to
// read it, and the stream with it.
func (b *call) end() {
	b.conn.tenant.room.mu.Lock()
	defer b.conn.tenant.room.mu.Unlock()
	b.ended = true
	b.conn.give(b.buffers + b.kept)
	b.unread, b.buffers, b.kept = 0, 0, 0
	if b.unsent == 0 {
		b.drop()
	}
}

// reset: nothing will be sent any more. The handler may not have ended yet.
func (b *call) reset() {
	b.conn.give(b.unsent)
	b.unsent = 0
	if b.ended {
		b.drop()
	}
}

// drop forgets a call that has ended on both sides.
func (b *call) drop() {
	delete(b.conn.calls, b.stream)
	b.conn.give(callCost + b.buffers)
}

// read counts off a message that was decoded.
func (b *call) read(size int64) {
	b.conn.tenant.room.mu.Lock()
	defer b.conn.tenant.room.mu.Unlock()
	if b.ended {
		return
	}
	// Which buffers a part of the next message is in is not known: all count on.
	if b.unread -= size; b.unread <= 0 {
		b.conn.give(b.buffers)
		b.unread, b.buffers = 0, 0
	}
}

// keep counts what is remembered of a request; false if there is no room.
func (b *call) keep(m any) bool {
	size, replaces := remembered(m, !b.named)
	b.conn.tenant.room.mu.Lock()
	defer b.conn.tenant.room.mu.Unlock()
	if size == 0 || b.ended || b.conn.closed {
		return true
	}
	if !b.conn.takeSoon(size, endingPatience) {
		b.conn.tenant.room.refused("room")
		return false
	}
	if b.ended || b.conn.closed { // meanwhile
		b.conn.give(size)
		return true
	}
	if replaces {
		b.conn.give(b.kept)
		b.kept = 0
	}
	b.kept, b.named = b.kept+size, true
	return true
}

// send waits for room for a message to the client.
func (b *call) send(ctx context.Context, m any) error {
	p, ok := m.(proto.Message)
	if !ok {
		return nil // the codec refuses it
	}
	size := int64(messageHead + proto.Size(p))
	err := b.conn.wait(ctx, size, func() {
		if b.ended || b.conn.closed {
			b.conn.give(size)
			return
		}
		b.unsent += size
	})
	if err != nil {
		return status.FromContextError(err).Err()
	}
	return nil
}

// messageHead is what gRPC puts before each message.
const messageHead = 5

// remembered is what a discovery stream remembers of a request until it ends, at
// most. A state-of-the-world request replaces what the one before it named; first is
// the one that names the client.
func remembered(m any, first bool) (size int64, replaces bool) {
	count := func(texts ...string) {
		for _, text := range texts {
			size += frameCost + int64(len(text))
		}
	}
	switch m := m.(type) {
	case *discoveryv3.DeltaDiscoveryRequest:
		count(m.GetResourceNamesSubscribe()...)
		for name, version := range m.GetInitialResourceVersions() {
			size += frameCost + int64(len(name)+len(version))
		}
		if first && m.GetNode().GetId() != "" {
			count(m.GetNode().GetId())
		}
	case *discoveryv3.DiscoveryRequest:
		replaces = true
		count(m.GetResourceNames()...)
		count(m.GetVersionInfo(), m.GetNode().GetId())
	}
	return size, replaces
}

// plain is no security at all (a socket is a pod's), and tells calls their connection.
type plain struct {
	credentials.TransportCredentials
}

func newPlain() plain { return plain{insecure.NewCredentials()} }

// AuthType implements credentials.AuthInfo.
func (c *conn) AuthType() string { return "unix" }

// ServerHandshake implements credentials.TransportCredentials.
func (plain) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	c, ok := raw.(*conn)
	if !ok {
		return nil, nil, errors.New("connection is not counted")
	}
	return c, c, nil
}

// connOf returns the connection that a call came on.
func connOf(ctx context.Context) *conn {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil
	}
	c, _ := p.AuthInfo.(*conn)
	return c
}

// reads tells calls of messages that were decoded. A call that takes one message
// only counts it to its end, as its handler has it.
type reads struct{}

func (reads) HandleRPC(ctx context.Context, s stats.RPCStats) {
	in, ok := s.(*stats.InPayload)
	if !ok {
		return
	}
	if b := callOf(ctx); b != nil && b.many {
		b.read(int64(in.WireLength))
	}
}

func (reads) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context   { return ctx }
func (reads) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }
func (reads) HandleConn(context.Context, stats.ConnStats)                       {}
