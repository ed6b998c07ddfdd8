package discovery

import (
	"bytes"
	"crypto/sha256"
	"slices"
	"time"

	"sigs.k8s.io/yaml"

	"castellan.dev/authz"
)

// cutSettle is how long a file that was cut at the end of a document must stay so
// before that counts: whoever is writing the rest had the time to.
const cutSettle = 2 * time.Second

const (
	reasonWriting = "some process has the file open for writing; what it held before stays in force until that is closed. " +
		"Replace policy files by rename"
	reasonEmptied = "looks half-written: it holds no document any more. What it held before stays in force; " +
		"remove the file to remove its policies"
	reasonCutBetween = "looks half-written: what is left is the beginning of what it held before. What it held before stays in force; " +
		"replace the file by rename, or remove it to remove its policies"
	reasonCutWithin = "looks half-written: what is left is the beginning of what it held before, and ends within a document. " +
		"What it held before stays in force; replace the file by rename, or remove it to remove its policies"
)

// doubt says why a file's content does not count, or not yet.
type doubt struct {
	// wait is how long it must stay as it is before it counts; 0: it never does.
	wait time.Duration
	// reason, if it is to be reported once it has lasted.
	reason string
}

// doubtOf judges content that would take the place of another (old, nil if there
// is none). A beginning of a policy often is a valid policy, and a wider one: it
// must not take the place of the whole.
func doubtOf(old, next *file) *doubt {
	if next.writers == writersOpen {
		return &doubt{reason: reasonWriting}
	}
	inPlace := old != nil && old.id != "" && old.id == next.id
	if old != nil && len(old.docs) > 0 && len(next.docs) == 0 {
		// An empty file under a new inode is what a crash leaves of a rename; one
		// with comments somebody has put there.
		if inPlace || len(bytes.TrimSpace(next.text)) == 0 {
			return &doubt{reason: reasonEmptied}
		}
	}
	if inPlace && next.text != nil {
		if d := doubtCut(old, next); d != nil {
			return d
		}
	}
	switch {
	case next.doubtful():
		return &doubt{wait: settle}
	case inPlace && next.writers == writersUnknown && len(next.docs) < len(old.docs):
		return &doubt{wait: settle}
	}
	return nil
}

func doubtCut(old, next *file) *doubt {
	before := [][]byte{old.text}
	if old.good != nil {
		before = append(before, old.good.Text)
	}
	for _, b := range before {
		switch cut, between := cutOf(b, next.text); {
		case !cut:
		case !between:
			return &doubt{reason: reasonCutWithin}
		case next.writers == writersUnknown:
			return &doubt{reason: reasonCutBetween} // its writer may be at it still
		default:
			return &doubt{reason: reasonCutBetween, wait: cutSettle}
		}
	}
	return nil
}

// cutOf reports whether text is a beginning of old that says less than old, and
// whether it ends between two documents.
func cutOf(old, text []byte) (cut, between bool) {
	if len(text) >= len(old) || !bytes.HasPrefix(old, text) {
		return false, false
	}
	was, is := objectsOf(old), objectsOf(text)
	if slices.Equal(was, is) {
		return false, false // comments and white space
	}
	return true, len(is) > 0 && len(is) <= len(was) && slices.Equal(is, was[:len(is)])
}

// objectsOf returns hashes of what the documents of a file say.
func objectsOf(data []byte) [][sha256.Size]byte {
	var out [][sha256.Size]byte
	for _, p := range split(data) {
		object, err := yaml.YAMLToJSONStrict(p.text)
		if err != nil {
			object = append([]byte("not YAML: "), p.text...)
		} else if string(object) == "null" {
			continue
		}
		out = append(out, sha256.Sum256(object))
	}
	return out
}

// report notes that next is doubted, and says whether there is news to tell. Until
// it has lasted there is none: most often it is an editor at work.
func (f *file) report(why *doubt, now time.Time) (news bool) {
	if why.reason == "" {
		return false
	}
	if f.doubted.IsZero() {
		f.doubted = now
	}
	if f.held == why.reason || now.Sub(f.doubted) < settle {
		return false
	}
	f.held = why.reason
	return true
}

// clear ends all doubt, and says whether there had been any to tell of.
func (f *file) clear() (news bool) {
	news = f.held != ""
	f.candidate, f.held, f.doubted = nil, "", time.Time{}
	return news
}

// heldNotice is what there is to say of a file whose content does not count.
func heldNotice(path, reason string) FileDocument {
	return FileDocument{File: path, notice: true, kept: true, Findings: []authz.Finding{{
		Severity: authz.SeverityError, Field: wholeFile, Reason: reason}}}
}
