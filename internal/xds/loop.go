package xds

import (
	"context"
	"errors"
	"io"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// transport is a stream of either variant.
type transport[Req, Resp any] interface {
	Context() context.Context
	Send(Resp) error
	Recv() (Req, error)
}

// machine is one stream's protocol state, without any I/O or clock.
type machine[Req, Resp any] interface {
	// request takes what the peer said; an error ends the stream.
	request(Req) error
	// refresh takes the source's present state of a type whose change was announced.
	refresh(typeURL string)
	// next returns the next response that may go out now, and if there is none, how
	// long to wait for one that is only held back by an unanswered one (0: not at all).
	next(now time.Time) (resp Resp, ok bool, wait time.Duration)
}

// serve runs one stream. Three goroutines: one receives, one sends (so that a
// peer that does not read cannot hold the stream for ever), and this one owns the
// state. The other two end when the handler returns, since gRPC then ends the stream.
func serve[Req, Resp any](tr transport[Req, Resp], m machine[Req, Resp], w *watcher, cfg Config) error {
	ctx := tr.Context()
	defer close(w.done)
	requests, received := receive(tr, w.done)
	outbox, sent := make(chan Resp), make(chan error, 1)
	defer close(outbox)
	go func() {
		for resp := range outbox {
			sent <- tr.Send(resp)
		}
	}()

	slow, held := stoppedTimer(), stoppedTimer()
	defer slow.Stop()
	defer held.Stop()
	sending := false
	for {
		if !sending {
			resp, ok, wait := m.next(cfg.Now())
			if ok {
				outbox <- resp // the sender is idle and takes it at once
				sending = true
				slow.Reset(cfg.Limits.SendTimeout)
			} else if wait > 0 {
				held.Reset(wait)
			}
		}
		select {
		case req := <-requests:
			if err := m.request(req); err != nil {
				return err
			}
		case url := <-w.announced:
			m.refresh(url)
		case err := <-sent:
			if err != nil && ctx.Err() != nil {
				return nil // the end, seen by the sender first
			}
			if err != nil {
				return err
			}
			sending = false
			slow.Stop()
		case <-slow.C:
			return status.Error(codes.Unavailable, "responses are not being read")
		case <-held.C:
		case err := <-received:
			if errors.Is(err, io.EOF) || status.Code(err) == codes.Canceled || ctx.Err() != nil {
				return nil
			}
			return err
		case <-ctx.Done():
			return nil
		}
	}
}

func receive[Req, Resp any](tr transport[Req, Resp], done <-chan struct{}) (<-chan Req, <-chan error) {
	requests, failed := make(chan Req), make(chan error, 1)
	go func() {
		for {
			req, err := tr.Recv()
			if err != nil {
				failed <- err
				return
			}
			select {
			case requests <- req:
			case <-done:
				return
			}
		}
	}()
	return requests, failed
}

func stoppedTimer() *time.Timer {
	t := time.NewTimer(time.Hour)
	t.Stop()
	return t
}

// watcher turns the source's closed channels into announcements by type.
type watcher struct {
	announced chan string
	done      chan struct{}
}

func newWatcher() *watcher {
	return &watcher{announced: make(chan string), done: make(chan struct{})}
}

// watch announces typeURL once changed is closed. There is one watch at a time
// per type: the machine sets the next one when it refreshes.
func (w *watcher) watch(typeURL string, changed <-chan struct{}) {
	go func() {
		select {
		case <-changed:
		case <-w.done:
			return
		}
		select {
		case w.announced <- typeURL:
		case <-w.done:
		}
	}()
}
