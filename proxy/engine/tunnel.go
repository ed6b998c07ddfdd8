package engine

import (
	"errors"
	"io"
	"net/http"
)

// errNoTunnel: only an HTTP/1.1 client can be switched.
var errNoTunnel = errors.New("engine: upgrade without a tunnel")

// tunnel passes a 101 on and then bytes both ways, until both directions ended
// or neither moved for the stream idle timeout.
func (x *exchange) tunnel(to sink) *failure {
	s, ok := to.(*h1Sink)
	if !ok {
		return fail(http.StatusBadGateway, ReasonBadResponse, errNoTunnel)
	}
	s.headed, s.close = true, true
	x.conn.becomeTunnel()
	x.outcome.Status, x.outcome.Upgraded = http.StatusSwitchingProtocols, true
	s.line(&x.res)
	x.out.str("Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
	if err := x.out.flush(); err != nil {
		return clientGone(err)
	}
	x.held = x.conn.wire.take(headBuffer)
	x.stream()
	x.conn.wire.busy, x.conn.wire.idle = &x.act, x.clientIdle
	x.uout.frame(untilClose, 0)
	x.out.frame(untilClose, 0)
	x.in.begin(&x.conn.wire, untilClose, 0)
	x.startPump(&halfClose{&x.uout}, &x.in)
	up := x.up
	up.in.begin(&up.wire, untilClose, 0)
	readErr, writeErr := relay(&halfClose{&x.out}, &up.in)
	if readErr == nil && writeErr == nil {
		// The upstream has ended its direction; the client's goes on.
		<-x.pump.done
		readErr, writeErr = x.pump.readErr, x.pump.writeErr
	}
	if err := errors.Join(readErr, writeErr); err != nil {
		// Either side is gone or silent: both are closed.
		abort(x.conn.conn)
		abort(up.wire.conn)
		reason := ReasonReset
		if isTimeout(err) {
			reason = ReasonBodyTimeout
		}
		x.note(fail(0, reason, err))
	}
	return nil
}

func (c *Conn) becomeTunnel() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.tunnel = true
}

// halfClose passes the end of one direction on.
type halfClose struct{ *messageOut }

func (h *halfClose) finish([]Field) error {
	if err := h.flush(); err != nil {
		return err
	}
	if !closeWrite(h.wire.conn) {
		return io.ErrClosedPipe // cannot be half closed: end both directions
	}
	return nil
}
