package proxy

import (
	"maps"
	"slices"

	"castellan.dev/internal/tlsconf"
)

// destinations are the services as told, and what was made of them last. What is
// handed out is not changed any more.
type destinations struct {
	told map[string]*service
	// known: the server has said what services there are. Until then an address that
	// is none of theirs may be one all the same.
	known bool

	resolved    map[string]*service
	index       *index
	resolvedFor string
	// touched are the names that changed since.
	touched map[string]bool
}

// set takes a service as told, nil for one that is gone.
func (d *destinations) set(name string, s *service) {
	if d.told == nil {
		d.told, d.touched = map[string]*service{}, map[string]bool{}
	}
	if s == nil {
		delete(d.told, name)
	} else {
		d.told[name] = s
	}
	d.touched[name] = true
}

// resolve gives services the identities of the trust at hand: of those that
// changed, or of all when the trust did.
func (d *destinations) resolve(trust *tlsconf.Trust) (map[string]*service, *index) {
	version := ""
	if trust != nil {
		version = trust.Version
	}
	switch {
	case d.resolved == nil || d.resolvedFor != version:
		d.resolved, d.resolvedFor = make(map[string]*service, len(d.told)), version
		for name, s := range d.told {
			d.resolved[name] = s.resolve(trust)
		}
		d.index = newIndex().changed(nil, slices.Collect(maps.Values(d.resolved)))
	case len(d.touched) > 0:
		d.resolveTouched(trust)
	}
	clear(d.touched)
	if !d.known {
		return d.resolved, nil
	}
	return d.resolved, d.index
}

func (d *destinations) resolveTouched(trust *tlsconf.Trust) {
	var before, after []*service
	next := maps.Clone(d.resolved)
	for name := range d.touched {
		if s := next[name]; s != nil {
			before = append(before, s)
			delete(next, name)
		}
		if s := d.told[name]; s != nil {
			next[name] = s.resolve(trust)
			after = append(after, next[name])
		}
	}
	d.resolved, d.index = next, d.index.changed(before, after)
}
