package kube

import "iter"

// users are services with an endpoint at an address: most often there is one, and
// for that a set of its own would be much.
type users struct {
	one  *service
	more map[*service]bool // besides one
}

func (x users) with(s *service) users {
	switch {
	case x.one == nil || x.one == s:
		x.one = s
	case x.more == nil:
		x.more = map[*service]bool{s: true}
	default:
		x.more[s] = true
	}
	return x
}

func (x users) without(s *service) users {
	if x.one != s {
		delete(x.more, s)
		return x
	}
	x.one = nil
	for other := range x.more {
		x.one = other
		delete(x.more, other)
		break
	}
	return x
}

func (x users) all() iter.Seq[*service] {
	return func(yield func(*service) bool) {
		if x.one == nil || !yield(x.one) {
			return
		}
		for s := range x.more {
			if !yield(s) {
				return
			}
		}
	}
}
