package install

import (
	"fmt"
	"strings"
)

// Outcomes of one check.
const (
	OK      = "ok"
	Warning = "warning"
	Failed  = "failed"
)

// Result is the outcome of one check.
type Result struct {
	Check  string `json:"check"`
	Status string `json:"status"`
	// Message says what is, Hint what to do.
	Message string `json:"message,omitempty"`
	Hint    string `json:"hint,omitempty"`
}

// results gathers outcomes.
type results []Result

func (r *results) ok(check, format string, args ...any) {
	*r = append(*r, Result{Check: check, Status: OK, Message: fmt.Sprintf(format, args...)})
}

func (r *results) warn(check, hint, format string, args ...any) {
	*r = append(*r, Result{Check: check, Status: Warning, Message: fmt.Sprintf(format, args...), Hint: hint})
}

func (r *results) fail(check, hint, format string, args ...any) {
	*r = append(*r, Result{Check: check, Status: Failed, Message: fmt.Sprintf(format, args...), Hint: hint})
}

// unknown is a check that could not be made. It fails: what is not known is not well.
func (r *results) unknown(check string, err error) {
	r.fail(check, "the API server must answer, and allow you to read this", "could not be checked: %v", err)
}

// maxNamed is how many of a list are named in a message.
const maxNamed = 5

// some names a list's first few.
func some(names []string) string {
	if len(names) <= maxNamed {
		return strings.Join(names, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(names[:maxNamed], ", "), len(names)-maxNamed)
}

// count says how many there are of what.
func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}
