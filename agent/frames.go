package agent

import "encoding/binary"

// Frames of HTTP/2 (RFC 9113, section 4.1).
const (
	prefaceSize  = 24
	headSize     = 9
	frameData    = 0x0
	frameHeaders = 0x1
	frameReset   = 0x3
)

type frame struct {
	size   int64
	kind   byte
	stream uint32
}

// frames finds the frames in what passes in one direction.
type frames struct {
	skip int64 // bytes until the next frame's head
	head [headSize]byte
	have int
}

// pass visits each frame whose head is complete; it ends with the first refused.
func (f *frames) pass(p []byte, visit func(frame) bool) bool {
	for len(p) > 0 {
		if f.skip > 0 {
			n := min(f.skip, int64(len(p)))
			f.skip, p = f.skip-n, p[n:]
			continue
		}
		n := copy(f.head[f.have:], p)
		f.have, p = f.have+n, p[n:]
		if f.have < headSize {
			return true
		}
		f.have = 0
		f.skip = int64(f.head[0])<<16 | int64(f.head[1])<<8 | int64(f.head[2])
		stream := binary.BigEndian.Uint32(f.head[5:]) &^ (1 << 31)
		if !visit(frame{size: f.skip, kind: f.head[3], stream: stream}) {
			return false
		}
	}
	return true
}
