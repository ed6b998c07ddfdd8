package agent_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"net"
	"sync"
	"testing"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// hog is a client that begins many messages on a socket and ends none, for as long
// as it is let; a connection that is cut is opened anew.
type hog struct {
	dial    func(context.Context) (net.Conn, error)
	method  string
	streams int
	size    uint32 // of each message, as announced; all but its last byte is sent
	frame   int    // bytes in a frame; 0 means 16 KiB
}

// run goes on until ctx ends.
func (h hog) run(ctx context.Context) {
	for ctx.Err() == nil {
		if conn, err := h.dial(ctx); err == nil {
			h.once(ctx, conn)
		}
	}
}

// hogs runs them until stop is called, or the test ends.
func hogs(t *testing.T, all ...hog) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	for _, h := range all {
		running.Go(func() { h.run(ctx) })
	}
	stop = func() { cancel(); running.Wait() }
	t.Cleanup(stop)
	return stop
}

// windows is what a connection may send: by stream, and in all under 0.
type windows struct {
	mu      sync.Mutex
	changed *sync.Cond
	left    map[uint32]int
	ended   bool
}

func (h hog) once(ctx context.Context, conn net.Conn) {
	w := &windows{left: map[uint32]int{0: 65535}}
	w.changed = sync.NewCond(&w.mu)
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	var reading sync.WaitGroup
	defer reading.Wait()
	defer conn.Close()
	framer := http2.NewFramer(conn, conn)
	if _, err := conn.Write([]byte(http2.ClientPreface)); err != nil {
		return
	}
	if framer.WriteSettings() != nil {
		return
	}
	reading.Go(func() { w.follow(framer) })
	head := binary.BigEndian.AppendUint32([]byte{0}, h.size)
	for i := range h.streams {
		w.mu.Lock()
		err := framer.WriteHeaders(http2.HeadersFrameParam{StreamID: stream(i), BlockFragment: h.headers(), EndHeaders: true})
		if err == nil {
			err = framer.WriteData(stream(i), false, head)
		}
		w.left[stream(i)] += 65535 - len(head)
		w.left[0] -= len(head)
		w.mu.Unlock()
		if err != nil {
			return
		}
	}
	h.feed(framer, w)
}

func stream(i int) uint32 { return uint32(2*i + 1) }

func (h hog) headers() []byte {
	var b bytes.Buffer
	e := hpack.NewEncoder(&b)
	for _, kv := range [][2]string{
		{":method", "POST"}, {":scheme", "http"}, {":path", h.method}, {":authority", "x"},
		{"content-type", "application/grpc"}, {"te", "trailers"}, {"workload.spiffe.io", "true"},
	} {
		_ = e.WriteField(hpack.HeaderField{Name: kv[0], Value: kv[1]})
	}
	return b.Bytes()
}

// feed sends what the windows allow until the connection ends.
func (h hog) feed(framer *http2.Framer, w *windows) {
	frame := make([]byte, max(h.frame, 1))
	if h.frame == 0 {
		frame = make([]byte, 16<<10)
	}
	left := make([]int, h.streams)
	for i := range left {
		left[i] = int(h.size) - 1
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for !w.ended {
		sent := false
		for i := range left {
			n := min(len(frame), left[i], w.left[stream(i)], w.left[0])
			if n <= 0 {
				continue
			}
			if framer.WriteData(stream(i), false, frame[:n]) != nil {
				return
			}
			left[i] -= n
			w.left[stream(i)] -= n
			w.left[0] -= n
			sent = true
		}
		if !sent {
			w.changed.Wait()
		}
	}
}

// follow reads until the connection ends. Its answers go out beside the data, as
// the lock is held for both.
func (w *windows) follow(framer *http2.Framer) {
	for {
		f, err := framer.ReadFrame()
		w.mu.Lock()
		switch f := f.(type) {
		case *http2.SettingsFrame:
			if !f.IsAck() {
				err = framer.WriteSettingsAck()
			}
		case *http2.PingFrame:
			if !f.IsAck() {
				err = framer.WritePing(true, f.Data)
			}
		case *http2.WindowUpdateFrame:
			w.left[f.StreamID] += int(f.Increment)
		}
		w.ended = err != nil
		w.changed.Broadcast()
		w.mu.Unlock()
		if err != nil {
			return
		}
	}
}
