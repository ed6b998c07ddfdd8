package discovery

import (
	"fmt"

	"castellan.dev/api/policy"
)

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
