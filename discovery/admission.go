package discovery

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"castellan.dev/authz"
)

// inForce is one document that is enforced.
type inForce struct {
	ref Ref
	good
	// last: not the present version, which was refused, but the last good one.
	last bool
	// portSets are those of the workloads it selects.
	portSets []int
}

// denial says that workloads deny everything, because of a refused document.
type denial struct {
	scope  scope
	reason string
}

// docStatus is what there is to say of one document.
type docStatus struct {
	FileDocument
	accepted, lastGood bool
	// denies, for a refused document without a last good version, is whom it could select.
	denies *scope
	// hash is of the content of an accepted AuthorizationPolicy, and portSets are
	// those of the workloads it selects.
	hash     string
	portSets []int
}

// admission is the outcome for all documents. It is immutable.
type admission struct {
	docs    []*inForce // by kind, namespace and name
	denials []denial
	// denialsIn are the places in denials of those for one namespace; "" has those
	// that may be for any.
	denialsIn map[string][]int
	statuses  []docStatus
	good      map[Ref]good
	// sources are the texts of the files that documents come from, by path, as far
	// as nothing in them was refused.
	sources map[string]*source
}

// admit decides what is in force: every document without errors, the last good
// version of every other, and where there is none a denial for whoever it could
// select (rule 21: a policy that cannot be read may have been a DENY).
func admit(docs []FileDocument, before map[Ref]good) *admission {
	a := &admission{good: map[Ref]good{}, denialsIn: map[string][]int{}, sources: map[string]*source{}}
	mentioned := map[Ref]bool{}
	for _, d := range docs {
		mentioned[d.Ref] = true
	}
	nameless := map[string][]int{} // by file: refused documents that nobody can tell which they are
	for _, d := range docs {
		st := docStatus{FileDocument: d}
		switch {
		case d.notice:
			st.lastGood = d.kept
		case d.foreign:
		case !d.Refused():
			st.accepted = true
			if d.src != nil {
				a.sources[d.File] = d.src
			}
			a.enforce(d.Ref, newGood(d), false)
		case d.Ref.complete():
			if g, ok := before[d.Ref]; ok && g.of(d) {
				st.lastGood = true
				g.File = d.File
				a.enforce(d.Ref, g, true)
			} else {
				st.denies = &d.scope
			}
		default:
			nameless[d.File] = append(nameless[d.File], len(a.statuses))
		}
		a.statuses = append(a.statuses, st)
	}
	for file, at := range nameless {
		a.resolve(file, at, before, mentioned)
	}
	for _, st := range a.statuses {
		if st.denies != nil {
			a.denialsIn[st.denies.namespace] = append(a.denialsIn[st.denies.namespace], len(a.denials))
			a.denials = append(a.denials, denial{scope: *st.denies, reason: st.denialReason()})
		}
	}
	slices.SortFunc(a.docs, func(x, y *inForce) int {
		return cmp.Or(cmp.Compare(x.ref.Kind, y.ref.Kind), cmp.Compare(x.ref.Namespace, y.ref.Namespace), cmp.Compare(x.ref.Name, y.ref.Name))
	})
	return a
}

func (a *admission) enforce(ref Ref, g good, last bool) {
	if _, ok := a.good[ref]; ok {
		return // two refused documents of one name: one last good version
	}
	a.good[ref] = g
	a.docs = append(a.docs, &inForce{ref: ref, good: g, last: last})
}

// resolve handles the parts of a file that nobody can tell which documents they
// are. They can only be those that the file held before and does not show now, so
// these all stay; where there are fewer than parts, some part is new, and then
// whoever the parts could select denies.
func (a *admission) resolve(file string, at []int, before map[Ref]good, mentioned map[Ref]bool) {
	var missing []Ref
	for ref, g := range before {
		if g.File == file && !mentioned[ref] {
			missing = append(missing, ref)
		}
	}
	slices.SortFunc(missing, func(x, y Ref) int { return cmp.Compare(x.String(), y.String()) })
	for _, ref := range missing {
		a.enforce(ref, before[ref], true)
		a.statuses = append(a.statuses, docStatus{
			FileDocument: FileDocument{File: file, Ref: ref, Findings: []authz.Finding{{Severity: authz.SeverityError,
				Field: wholeFile, Reason: "the file cannot be read whole any more; the last good version stays in force"}}},
			lastGood: true,
		})
	}
	for _, i := range at {
		// A file that cannot be read at all may hold any number of documents; those
		// that are known of it are taken for all.
		if whole := a.statuses[i].Line == 0; len(missing) >= len(at) || whole && len(missing) > 0 {
			a.statuses[i].lastGood = true
		} else {
			a.statuses[i].denies = &a.statuses[i].scope
		}
	}
}

// denialReason explains to the log why workloads deny everything.
func (s docStatus) denialReason() string {
	f := s.firstError()
	what := s.Place()
	if s.Ref.complete() && s.File != "" {
		what += ": " + s.Ref.String()
	}
	why := f.Reason
	if f.Value != "" {
		why = fmt.Sprintf("%q: %s", f.Value, why)
	}
	if f.Field != "" {
		why = f.Field + ": " + why
	}
	// A file's name may be any bytes, but this travels as text.
	return strings.ToValidUTF8(what+" was refused and has no last good version: "+why, "?")
}
