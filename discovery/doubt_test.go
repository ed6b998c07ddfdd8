package discovery_test

import (
	"strings"
	"testing"

	"castellan.dev/discovery"
)

// TestDoubt: what counts of a change, by how it was made and what the system tells
// of writers.
func TestDoubt(t *testing.T) {
	a, b := allow("a", "orders", "frontend"), allow("b", "orders", "frontend")
	both, within := a+"---"+b, deny("a", "orders")
	const rename, inPlace = false, true
	for name, c := range map[string]struct {
		old, next string
		inPlace   bool
		writers   string
		want      string
	}{
		"a change":                          {a, b, inPlace, "none", "counts"},
		"a change, writers unknown":         {a, b, inPlace, "unknown", "counts"},
		"a change being written":            {a, b, inPlace, "open", "never"},
		"renamed while being written":       {a, b, rename, "open", "never"},
		"something refused":                 {a, "x", inPlace, "none", "after 350ms"},
		"emptied":                           {a, "", inPlace, "none", "never"},
		"emptied by rename":                 {a, "", rename, "none", "never"},
		"comments":                          {a, "# x", inPlace, "none", "never"},
		"comments by rename":                {a, "# x", rename, "none", "after 350ms"},
		"cut between":                       {both, a, inPlace, "none", "after 2s"},
		"cut between, writers unknown":      {both, a, inPlace, "unknown", "never"},
		"cut between, by rename":            {both, a, rename, "none", "counts"},
		"cut within":                        {within, within[:strings.Index(within, "    to:")], inPlace, "none", "never"},
		"cut within, by rename":             {within, within[:strings.Index(within, "    to:")], rename, "none", "counts"},
		"cut within the second":             {both, both[:len(both)-20], inPlace, "none", "never"},
		"a comment less":                    {a + "# end", a, inPlace, "none", "counts"},
		"a document less":                   {both, b, inPlace, "none", "counts"},
		"a document less, writers unknown":  {both, b, inPlace, "unknown", "after 350ms"},
		"the beginning of what was no good": {"}{" + a, "}{", inPlace, "none", "never"},
	} {
		t.Run(name, func(t *testing.T) {
			if got := discovery.Doubt(c.old, c.next, c.inPlace, c.writers); got != c.want {
				t.Errorf("%s, want %s", got, c.want)
			}
		})
	}
}
