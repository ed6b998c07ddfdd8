package proxy

import (
	"maps"
	"slices"

	castellanv1 "castellan.dev/api/castellan/v1"
	"castellan.dev/internal/tlsconf"
	"castellan.dev/internal/xds"
)

// destinations are the services, with the identities of the trust at hand. What is
// handed out is not changed any more.
type destinations struct {
	// known: the server has said what services there are. Until then an address that
	// is none of theirs may be one all the same.
	known bool

	resolved    map[string]*service
	resolvedFor resolvedFor
	index       *index
	// touched are those that were told since, nil for one that is gone.
	touched map[string]*service
}

// resolvedFor is what services were resolved by: a version of the trust, and the
// workload's namespace.
type resolvedFor struct{ version, home string }

// now is the service as told last; nil for none.
func (d *destinations) now(name string) *service {
	if s, told := d.touched[name]; told {
		return s
	}
	return d.resolved[name]
}

// take reads a service. One that cannot be read leaves what it would replace.
func (d *destinations) take(r xds.Resource) error {
	var message castellanv1.ServiceIdentity
	if err := unpack(r, &message); err != nil {
		return err
	}
	name := message.GetNamespace() + "/" + message.GetName()
	s, err := newService(&message, d.now(name))
	if err != nil {
		return err
	}
	d.set(name, s)
	return nil
}

// set takes a service as told, nil for one that is gone.
func (d *destinations) set(name string, s *service) {
	if d.touched == nil {
		d.touched = map[string]*service{}
	}
	d.touched[name] = s
}

// resolve gives services the identities of the trust at hand: those that were
// told, or all when the trust or the workload's namespace changed.
func (d *destinations) resolve(trust *tlsconf.Trust, home string) (map[string]*service, *index) {
	by := resolvedFor{home: home}
	if trust != nil {
		by.version = trust.Version
	}
	switch {
	case d.resolved == nil || d.resolvedFor != by:
		next := maps.Clone(d.resolved)
		if next == nil {
			next = map[string]*service{}
		}
		maps.Copy(next, d.touched)
		maps.DeleteFunc(next, func(_ string, s *service) bool { return s == nil })
		for name, s := range next {
			next[name] = s.resolve(trust)
		}
		d.resolved, d.resolvedFor = next, by
		d.index = newIndex(home).changed(nil, slices.Collect(maps.Values(next)))
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
	for name, told := range d.touched {
		if s := next[name]; s != nil {
			before = append(before, s)
			delete(next, name)
		}
		if told != nil {
			next[name] = told.resolve(trust)
			after = append(after, next[name])
		}
	}
	d.resolved, d.index = next, d.index.changed(before, after)
}
