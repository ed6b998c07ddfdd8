package engine

import (
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// upConn is an HTTP/1.1 connection to an upstream.
type upConn struct {
	wire   wire
	in     bodyIn
	home   *keyPool // nil: not pooled
	raw    syscall.RawConn
	probe  func(fd uintptr) bool
	dead   bool
	reused bool
	// exact: the last response had a body of known framing, so nothing of it
	// can still be on its way.
	exact  bool
	idleAt time.Time
}

// upstreams holds idle upstream connections, by key and last used first: a few
// warm ones serve, the others time out. Its bound is per key.
type upstreams struct {
	engine *Engine
	mu     sync.Mutex
	keys   map[string]*keyPool
	timer  *time.Timer // sweeps while anything is idle
	closed bool
}

// keyPool holds the idle connections of one key.
type keyPool struct {
	parent *upstreams
	key    string
	gone   atomic.Bool // no longer in the map: ask for another
	mu     sync.Mutex
	idle   []*upConn
	// dropped: what comes back is closed.
	dropped bool
}

func (p *upstreams) init(e *Engine) { p.engine, p.keys = e, map[string]*keyPool{} }

// find returns the key's pool; nil when there is none.
func (p *upstreams) find(key string) *keyPool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.keys[key]
}

// pool returns the key's pool, made when there is none. The key is kept.
func (p *upstreams) pool(key string) *keyPool {
	p.mu.Lock()
	defer p.mu.Unlock()
	k := p.keys[key]
	if k == nil {
		k = &keyPool{parent: p, key: strings.Clone(key)}
		p.keys[k.key] = k
	}
	return k
}

// get returns an idle connection, or nil.
func (k *keyPool) get() *upConn {
	k.mu.Lock()
	defer k.mu.Unlock()
	n := len(k.idle)
	if n == 0 {
		return nil
	}
	u := k.idle[n-1]
	k.idle[n-1] = nil
	k.idle = k.idle[:n-1]
	return u
}

// put takes a connection back, or closes it.
func (k *keyPool) put(u *upConn, now time.Time) {
	u.idleAt, u.reused = now, true
	k.mu.Lock()
	if k.gone.Load() && !k.dropped {
		k.mu.Unlock()
		u.home = k.parent.pool(k.key)
		u.home.put(u, now)
		return
	}
	kept := !k.dropped && len(k.idle) < k.parent.engine.cfg.MaxIdleUpstream
	first := kept && len(k.idle) == 0
	if kept {
		k.idle = append(k.idle, u)
	}
	k.mu.Unlock()
	if !kept {
		u.close()
	}
	if first {
		k.parent.wake()
	}
}

// wake makes sure that idle connections are swept.
func (p *upstreams) wake() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.timer == nil && !p.closed {
		p.timer = time.AfterFunc(p.engine.cfg.UpstreamIdleTimeout, p.sweep)
	}
}

// sweep closes what was idle for too long, forgets keys that have nothing idle,
// and comes again while any is left.
func (p *upstreams) sweep() {
	limit := p.engine.cfg.Now().Add(-p.engine.cfg.UpstreamIdleTimeout)
	var old []*upConn
	p.mu.Lock()
	for key, k := range p.keys {
		k.mu.Lock()
		n := 0
		for n < len(k.idle) && !k.idle[n].idleAt.After(limit) {
			n++
		}
		old = append(old, k.idle[:n]...)
		k.idle = append(k.idle[:0], k.idle[n:]...)
		clear(k.idle[len(k.idle):cap(k.idle)])
		if len(k.idle) == 0 {
			k.gone.Store(true)
			delete(p.keys, key)
		}
		k.mu.Unlock()
	}
	p.timer = nil
	if len(p.keys) > 0 && !p.closed {
		p.timer = time.AfterFunc(p.engine.cfg.UpstreamIdleTimeout, p.sweep)
	}
	p.mu.Unlock()
	for _, u := range old {
		u.close()
	}
}

// drop closes idle connections of matching keys; those in use are closed when they come back.
func (p *upstreams) drop(match func(string) bool) {
	var old []*upConn
	p.mu.Lock()
	for key, k := range p.keys {
		if !match(key) {
			continue
		}
		k.mu.Lock()
		k.gone.Store(true)
		k.dropped = true
		old = append(old, k.idle...)
		k.idle = nil
		k.mu.Unlock()
		delete(p.keys, key)
	}
	p.mu.Unlock()
	for _, u := range old {
		u.close()
	}
}

func (p *upstreams) close() {
	p.mu.Lock()
	p.closed = true
	if p.timer != nil {
		p.timer.Stop()
	}
	p.mu.Unlock()
	p.drop(func(string) bool { return true })
}

// newUpConn wraps what Dial returned.
func (e *Engine) newUpConn(conn net.Conn, home *keyPool) *upConn {
	u := &upConn{home: home}
	u.wire = wire{conn: conn, pool: &e.buffers, now: e.cfg.Now}
	u.raw = rawConn(conn)
	u.probe = func(fd uintptr) bool {
		var one [1]byte
		n, err := syscall.Read(int(fd), one[:])
		// Only "nothing to read" is healthy: an end, an error and unasked
		// bytes (which would be taken for an answer) all spoil it.
		u.dead = n >= 0 || err != syscall.EAGAIN
		return true
	}
	return u
}

// alive tells whether an idle connection still looks usable.
func (u *upConn) alive() bool {
	if u.raw == nil {
		return true
	}
	u.dead = true
	if err := u.raw.Read(u.probe); err != nil {
		return false
	}
	return !u.dead
}

func (u *upConn) close() {
	u.wire.drop()
	_ = u.wire.conn.Close()
}
