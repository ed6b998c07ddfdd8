package engine

import (
	"errors"
	"io"
	"net"
	"os"
	"sync/atomic"
	"time"
)

// wire is one side's connection with its buffered input. One goroutine reads
// and one may write at the same time; each uses its own fields.
type wire struct {
	conn net.Conn
	pool *buffers
	now  func() time.Time

	// Input: buf[r:w] is unread. buf is nil while nothing is buffered.
	buf    []byte
	r, w   int
	readBy time.Time // read deadline in force

	writeBy time.Time // write deadline in force

	// busy, when set, is the exchange's clock of activity: a read that times
	// out goes on while the other direction moves. idle returns the time that
	// may pass without any.
	busy *activity
	idle func() time.Duration
}

// activity is when a byte last moved in either direction.
type activity struct{ at atomic.Int64 }

func (a *activity) touch(now time.Time) { a.at.Store(now.UnixNano()) }
func (a *activity) since(now time.Time) time.Duration {
	return time.Duration(now.UnixNano() - a.at.Load())
}

// slack is the part of a timeout by which a deadline may be off: renewing one
// costs more than parsing a head, so one that is nearly right is left.
func slack(d time.Duration) time.Duration { return d / 8 }

// armRead makes reads fail between 7/8 d and d from now.
func (w *wire) armRead(now time.Time, d time.Duration) {
	want := now.Add(d)
	if off := want.Sub(w.readBy); off >= 0 && off <= slack(d) {
		return
	}
	w.readBy = want
	_ = w.conn.SetReadDeadline(want) // fails on a closed connection only, as the read will
}

// armWrite does the same for writes.
func (w *wire) armWrite(now time.Time, d time.Duration) {
	want := now.Add(d)
	if off := want.Sub(w.writeBy); off >= 0 && off <= slack(d) {
		return
	}
	w.writeBy = want
	_ = w.conn.SetWriteDeadline(want)
}

func (w *wire) buffered() int { return w.w - w.r }

// read reads once from the connection. A timeout ends it only if the whole
// exchange was idle for long enough.
func (w *wire) read(p []byte) (int, error) {
	for {
		if w.busy != nil {
			w.armRead(w.now(), w.idle())
		}
		n, err := w.conn.Read(p)
		if w.busy == nil {
			return n, err
		}
		now := w.now()
		if n > 0 {
			w.busy.touch(now)
			return n, err
		}
		if !isTimeout(err) || w.busy.since(now) >= w.idle()-slack(w.idle()) {
			return n, err
		}
		w.readBy = time.Time{}
	}
}

// fill reads more input into the buffer, which must not be full (see room).
func (w *wire) fill() error {
	if w.buf == nil {
		w.buf = w.pool.get(headBuffer)
	}
	if w.r == w.w {
		w.r, w.w = 0, 0
	}
	n, err := w.read(w.buf[w.w:])
	w.w += n
	if n > 0 {
		return nil
	}
	if err == nil {
		err = io.ErrNoProgress
	}
	return err
}

// room makes the buffer hold at least size unread bytes, moving or growing it.
func (w *wire) room(size int) {
	switch {
	case len(w.buf)-w.r >= size:
	case len(w.buf) >= size:
		w.w = copy(w.buf, w.buf[w.r:w.w])
		w.r = 0
	default:
		bigger := w.pool.get(size)
		n := copy(bigger, w.buf[w.r:w.w])
		w.pool.put(w.buf)
		w.buf, w.r, w.w = bigger, 0, n
	}
}

// release gives the buffer back if nothing is in it.
func (w *wire) release() {
	if w.r == w.w && w.buf != nil {
		w.pool.put(w.buf)
		w.buf, w.r, w.w = nil, 0, 0
	}
}

// drop gives the buffer back with what is in it.
func (w *wire) drop() {
	w.r, w.w = 0, 0
	w.release()
}

// take hands the buffer to the caller (who holds strings into it) and goes on
// with another that has the unread bytes.
func (w *wire) take(size int) []byte {
	held := w.buf
	w.buf = w.pool.get(max(size, w.buffered()))
	w.w = copy(w.buf, held[w.r:w.w])
	w.r = 0
	return held
}

func isTimeout(err error) bool {
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return true
	}
	var ne net.Error
	return errors.As(err, &ne) && ne.Timeout()
}

// closeWrite ends the sending direction, where the connection can.
func closeWrite(conn net.Conn) bool {
	if c, ok := conn.(interface{ CloseWrite() error }); ok {
		return c.CloseWrite() == nil
	}
	return false
}
