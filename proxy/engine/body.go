package engine

import (
	"bytes"
	"errors"
	"io"
)

// body is a message body on its way in: an HTTP/1 one (bodyIn), an HTTP/2
// request's or an HTTP/2 response's.
type body interface {
	// read returns payload bytes; (0, io.EOF) at the end.
	read(p []byte) (int, error)
	// finished: nothing more will come; known without reading where framing tells.
	finished() bool
	// ready: read would not wait.
	ready() bool
	// trailer returns the trailer fields once finished.
	trailer() []Field
}

type bodyMode uint8

const (
	noBody bodyMode = iota
	byLength
	byChunks
	untilClose
)

// Bounds of chunked framing.
const (
	maxChunkLine   = 512
	maxChunkExcess = 16 << 10 // framing bytes beyond what the data carried justifies
	maxTrailer     = 8 << 10
	maxTrailers    = 64
)

type chunkState uint8

const (
	chunkSize chunkState = iota
	chunkData
	chunkEnd
	chunkTrailer
)

// bodyIn reads an HTTP/1 body from a wire. Framing is checked strictly and not
// passed on: extensions are dropped, the other side gets framing of its own.
type bodyIn struct {
	wire   *wire
	mode   bodyMode
	state  chunkState
	done   bool
	left   int64 // of the body, or of the current chunk
	total  int64 // payload bytes read
	excess int64
	fields []Field
	size   int   // bytes of trailers
	err    error // lasting: what came after it cannot be trusted
}

// begin readies b for a body of the given framing.
func (b *bodyIn) begin(w *wire, mode bodyMode, length int64) {
	*b = bodyIn{wire: w, mode: mode, left: length}
	b.done = mode == noBody || mode == byLength && length == 0
	if mode == byChunks {
		b.left = 0
	}
}

func (b *bodyIn) finished() bool   { return b.done && (b.err == nil || errors.Is(b.err, io.EOF)) }
func (b *bodyIn) trailer() []Field { return b.fields }

func (b *bodyIn) ready() bool { return b.done || b.err != nil || b.wire.buffered() > 0 }

// inline returns the body if all of it is buffered already and its length known.
func (b *bodyIn) inline() ([]byte, bool) {
	if b.done {
		return nil, true
	}
	if b.mode != byLength || b.left > int64(b.wire.buffered()) {
		return nil, false
	}
	return b.wire.buf[b.wire.r : b.wire.r+int(b.left)], true
}

// skipInline takes what inline returned off the wire.
func (b *bodyIn) skipInline() {
	if !b.done && b.mode == byLength {
		b.wire.r += int(b.left)
		b.total += b.left
		b.left, b.done = 0, true
	}
}

func (b *bodyIn) read(p []byte) (int, error) {
	if b.err != nil {
		return 0, b.err
	}
	if b.done {
		return 0, io.EOF
	}
	var n int
	var err error
	switch b.mode {
	case byLength:
		if int64(len(p)) > b.left {
			p = p[:b.left]
		}
		n, err = b.payload(p)
		b.left -= int64(n)
		b.done = b.left == 0
	case untilClose:
		if n, err = b.payload(p); errors.Is(err, io.EOF) {
			b.done = true
		}
	default:
		n, err = b.readChunks(p)
	}
	b.total += int64(n)
	if errors.Is(err, io.EOF) && !b.done {
		err = io.ErrUnexpectedEOF
	}
	b.err = err
	if n > 0 {
		return n, nil // the error comes with the next read
	}
	return n, err
}

// payload reads from the buffer, or straight from the connection.
func (b *bodyIn) payload(p []byte) (int, error) {
	w := b.wire
	if n := w.buffered(); n > 0 {
		n = copy(p, w.buf[w.r:w.w])
		w.r += n
		return n, nil
	}
	return w.read(p)
}

// readChunks decodes as much as is buffered, and waits only for the first byte.
func (b *bodyIn) readChunks(p []byte) (n int, err error) {
	for !b.done {
		if b.state == chunkData && b.left > 0 {
			if n == len(p) || n > 0 && b.wire.buffered() == 0 {
				return n, nil
			}
			part := p[n:]
			if int64(len(part)) > b.left {
				part = part[:b.left]
			}
			got, err := b.payload(part)
			n += got
			b.left -= int64(got)
			if err != nil {
				return n, err
			}
			if b.left == 0 {
				b.state = chunkEnd
			}
			continue
		}
		more, err := b.step()
		if err != nil {
			return n, err
		}
		if !more {
			continue
		}
		if n > 0 {
			return n, nil
		}
		b.wire.room(maxChunkLine + maxTrailer)
		if err := b.wire.fill(); err != nil {
			return 0, err
		}
	}
	return n, nil
}

// step takes one piece of framing off the buffer; more: it is not all there.
func (b *bodyIn) step() (more bool, err error) {
	w := b.wire
	in := w.buf[w.r:w.w]
	if b.state == chunkEnd {
		switch {
		case len(in) > 0 && in[0] != '\r' || len(in) > 1 && in[1] != '\n':
			return false, errChunkEnd
		case len(in) < 2:
			return true, nil
		}
		w.r += 2
		b.state = chunkSize
		return false, nil
	}
	limit := maxChunkLine
	if b.state == chunkTrailer {
		limit = maxTrailer
	}
	i := bytes.IndexByte(in, '\n')
	switch {
	case i < 0 && len(in) >= limit || i >= limit:
		return false, errChunkLine
	case i < 0:
		return true, nil
	case i == 0 || in[i-1] != '\r':
		return false, errBareLF
	}
	w.r += i + 1
	if b.state == chunkTrailer {
		return false, b.trailerLine(in[:i-1])
	}
	return false, b.sizeLine(in[:i-1])
}

// sizeLine reads "HEX[;extensions]".
func (b *bodyIn) sizeLine(line []byte) error {
	digits := 0
	var size int64
	for digits < len(line) && isHex(line[digits]) {
		c := lowerTable[line[digits]]
		if c >= 'a' {
			c -= 'a' - 10
		} else {
			c -= '0'
		}
		size = size<<4 | int64(c)
		digits++
	}
	if digits == 0 || digits > 15 {
		return errChunkSize
	}
	if rest := line[digits:]; len(rest) > 0 && (rest[0] != ';' || !all(&valueChars, rest)) {
		return errChunkSize
	}
	// A peer that sends mostly framing is refused (CVE-2023-39326).
	b.excess = max(0, b.excess+int64(len(line))+2-16-2*size)
	if b.excess > maxChunkExcess {
		return errChunkLine
	}
	b.left, b.state = size, chunkData
	if size == 0 {
		b.state = chunkTrailer
	}
	return nil
}

// trailerLine takes one line of the trailer section; it copies, as the buffer moves.
func (b *bodyIn) trailerLine(line []byte) error {
	if len(line) == 0 {
		b.done = true
		return nil
	}
	b.size += len(line)
	if b.size > maxTrailer || len(b.fields) == maxTrailers {
		return errTrailerLarge
	}
	field, err := splitField(bytes.Clone(line))
	if err != nil {
		return err
	}
	b.fields = append(b.fields, field)
	return nil
}
