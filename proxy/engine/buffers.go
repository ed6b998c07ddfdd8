package engine

import "sync"

// Buffer sizes: what an idle connection waits with, what holds an ordinary
// head, and what copies bodies.
const (
	tinyBuffer   = 1 << 10
	headBuffer   = 4 << 10
	streamBuffer = 32 << 10
)

// buffers are the engine's pools. Arrays are pooled, as putting back a slice
// would allocate its header.
type buffers struct {
	tiny, head, stream sync.Pool
}

// get returns a buffer of at least size bytes; above the largest class it is made for the purpose.
func (b *buffers) get(size int) []byte {
	switch {
	case size <= tinyBuffer:
		if p, ok := b.tiny.Get().(*[tinyBuffer]byte); ok {
			return p[:]
		}
		return make([]byte, tinyBuffer)
	case size <= headBuffer:
		if p, ok := b.head.Get().(*[headBuffer]byte); ok {
			return p[:]
		}
		return make([]byte, headBuffer)
	case size <= streamBuffer:
		if p, ok := b.stream.Get().(*[streamBuffer]byte); ok {
			return p[:]
		}
		return make([]byte, streamBuffer)
	}
	return make([]byte, size)
}

// put takes a buffer back; nil is fine.
func (b *buffers) put(p []byte) {
	switch cap(p) {
	case tinyBuffer:
		b.tiny.Put((*[tinyBuffer]byte)(p[:tinyBuffer]))
	case headBuffer:
		b.head.Put((*[headBuffer]byte)(p[:headBuffer]))
	case streamBuffer:
		b.stream.Put((*[streamBuffer]byte)(p[:streamBuffer]))
	}
}
