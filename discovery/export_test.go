package discovery

import (
	"context"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"castellan.dev/api/policy"
)

// Bare is a Server whose turns are taken by hand.
type Bare struct{ s *Server }

// NewBare makes a Server of one source of everything.
func NewBare(all interface {
	Source
	Inventory
}) Bare {
	s, err := New(Config{Source: all, Workloads: all, TrustDomain: spiffeid.RequireTrustDomainFromString("cluster.local"),
		NodeOf: func(context.Context, string) (string, error) { return "", ErrUnknownNode }})
	if err != nil {
		panic(err)
	}
	return Bare{s}
}

// Turn looks and publishes once.
func (b Bare) Turn() { b.s.update(context.Background(), b.s.look()) }

// Doubt judges a change of a file's text, as "counts", "after D" or "never".
func Doubt(old, next string, inPlace bool, who string) string {
	d := &Directory{cfg: DirectoryConfig{Mesh: policy.Mesh{}}}
	was := d.parse(&source{File: "a.yaml", ID: "1", Text: []byte(old)})
	is := d.parse(&source{File: "a.yaml", ID: "1", Text: []byte(next)})
	if !inPlace {
		is.id = "2"
	}
	is.writers = map[string]writers{"unknown": writersUnknown, "none": writersNone, "open": writersOpen}[who]
	switch why := doubtOf(was, is); {
	case why == nil:
		return "counts"
	case why.wait == 0:
		return "never"
	default:
		return fmt.Sprint("after ", why.wait)
	}
}
