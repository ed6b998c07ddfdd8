package server

import (
	"context"
	"errors"
	"net/netip"

	"google.golang.org/grpc/peer"

	"castellan.dev/internal/crowd"
)

// unprovedCalls are those under way whose caller has not proved himself: each may hold
// a message of maxMessage.
var unprovedCalls = crowd.Bounds{Total: 2048, PerSource: 512}

var errCrowdedOut = errors.New("too many calls under way whose callers have not proved themselves")

func sourceOf(ctx context.Context) netip.Addr {
	if p, ok := peer.FromContext(ctx); ok && p.Addr != nil {
		return crowd.Source(p.Addr)
	}
	return netip.Addr{}
}

type (
	endKey   struct{}
	placeKey struct{}
)

// withEnd remembers what ends a call.
func withEnd(ctx context.Context, end context.CancelCauseFunc) context.Context {
	return context.WithValue(ctx, endKey{}, end)
}

// unproved takes a place for a call, from which it may be driven out.
func (g *Gate) unproved(ctx context.Context) (context.Context, *crowd.Place) {
	end, ok := ctx.Value(endKey{}).(context.CancelCauseFunc)
	if !ok {
		end = func(error) {}
	}
	place := g.calls.Enter(sourceOf(ctx), func() { end(errCrowdedOut) })
	return context.WithValue(ctx, placeKey{}, place), place
}

// proved gives the place back: the caller is known, and has limits of his own. One
// that was driven out has ended.
func proved(ctx context.Context) {
	if place, ok := ctx.Value(placeKey{}).(*crowd.Place); ok {
		place.Leave()
	}
}
