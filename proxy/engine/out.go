package engine

import (
	"errors"
	"io"
	"strconv"
	"time"
)

// errShortBody: a body ended before its announced length.
var errShortBody = errors.New("engine: body shorter than its Content-Length")

// Room that chunked framing takes around data.
const (
	chunkHead = 6 // four hexadecimal digits and CRLF
	chunkTail = 2
	chunkLast = len("0\r\n\r\n")
	leastRoom = 512 // less free space than this is flushed first
)

// messageOut writes one HTTP/1 message: head and first body bytes go out in one Write.
type messageOut struct {
	wire    *wire
	buf     []byte // pooled
	n       int
	mode    bodyMode
	left    int64 // of byLength
	timeout time.Duration
	total   int64 // payload bytes written
	sent    bool  // bytes of this message reached the connection
}

// begin readies o for a message; the framing comes with frame.
func (o *messageOut) begin(w *wire, timeout time.Duration) {
	o.buf, o.n = w.pool.get(headBuffer), 0
	o.wire, o.timeout = w, timeout
	o.mode, o.left, o.total, o.sent = noBody, 0, 0, false
}

// release gives the buffer back.
func (o *messageOut) release() {
	if o.buf != nil {
		o.wire.pool.put(o.buf)
		o.buf = nil
	}
}

func (o *messageOut) frame(mode bodyMode, length int64) { o.mode, o.left = mode, length }

// str appends head bytes, growing the buffer for long heads.
func (o *messageOut) str(s string) {
	if len(o.buf)-o.n < len(s) {
		o.grow(len(s))
	}
	o.n += copy(o.buf[o.n:], s)
}

func (o *messageOut) grow(more int) {
	bigger := o.wire.pool.get(max(o.n+more, 2*len(o.buf)))
	copy(bigger, o.buf[:o.n])
	o.wire.pool.put(o.buf)
	o.buf = bigger
}

func (o *messageOut) field(name, value string) {
	if len(o.buf)-o.n < len(name)+len(value)+4 {
		o.grow(len(name) + len(value) + 4)
	}
	b := o.buf[o.n:]
	n := copy(b, name)
	n += copy(b[n:], ": ")
	n += copy(b[n:], value)
	n += copy(b[n:], "\r\n")
	o.n += n
}

// raw appends payload that is there already, whole.
func (o *messageOut) raw(b []byte) {
	o.total += int64(len(b))
	o.str(text(b))
}

func (o *messageOut) num(n int64) {
	var digits [20]byte
	o.str(text(strconv.AppendInt(digits[:0], n, 10)))
}

func appendInt(n int64) []byte { return strconv.AppendInt(nil, n, 10) }

// space returns where the next payload bytes go; it may flush first.
func (o *messageOut) space() ([]byte, error) {
	if int64(o.free()) < min(leastRoom, o.want()) {
		if err := o.flush(); err != nil {
			return nil, err
		}
	}
	if o.n == 0 && len(o.buf) < streamBuffer && o.want() > int64(len(o.buf)) && o.sent {
		o.release()
		o.buf = o.wire.pool.get(streamBuffer)
	}
	start, end := o.n, len(o.buf)
	if o.mode == byChunks {
		start, end = start+chunkHead, end-chunkTail-chunkLast
		end = min(end, start+0xffff)
	}
	return o.buf[start:end], nil
}

// free is the room for payload.
func (o *messageOut) free() int {
	free := len(o.buf) - o.n
	if o.mode == byChunks {
		free -= chunkHead + chunkTail + chunkLast
	}
	return free
}

// want is how much payload is still to come, as far as known.
func (o *messageOut) want() int64 {
	if o.mode == byLength {
		return o.left
	}
	return streamBuffer
}

// wrote takes n bytes that were put into what space returned.
func (o *messageOut) wrote(n int) error {
	o.total += int64(n)
	switch o.mode {
	case byChunks:
		const hex = "0123456789abcdef"
		b := o.buf[o.n:]
		b[0], b[1], b[2], b[3] = hex[n>>12&15], hex[n>>8&15], hex[n>>4&15], hex[n&15]
		b[4], b[5] = '\r', '\n'
		b[chunkHead+n], b[chunkHead+n+1] = '\r', '\n'
		o.n += chunkHead + n + chunkTail
	case byLength:
		if o.left -= int64(n); o.left < 0 {
			return io.ErrShortWrite // the reader bounds it: never
		}
		o.n += n
	default:
		o.n += n
	}
	return nil
}

// finish ends the message and flushes it.
func (o *messageOut) finish(trailer []Field) error {
	switch o.mode {
	case byLength:
		if o.left != 0 {
			return errShortBody
		}
	case byChunks:
		o.str("0\r\n")
		for _, f := range trailer {
			o.field(f.Name, f.Value)
		}
		o.str("\r\n")
	}
	return o.flush()
}

func (o *messageOut) flush() error {
	if o.n == 0 {
		return nil
	}
	now := o.wire.now()
	o.wire.armWrite(now, o.timeout)
	n, err := o.wire.conn.Write(o.buf[:o.n])
	o.sent = o.sent || n > 0
	if err != nil {
		return err
	}
	o.n = 0
	if o.wire.busy != nil {
		o.wire.busy.touch(now)
	}
	return nil
}
