package capture

import (
	"bytes"
	"slices"

	"github.com/google/nftables"
)

// span is the keys of a set from first to last, both included, in network order.
type span struct{ first, last []byte }

// merge sorts spans and joins those that overlap or touch.
func merge(spans []span) []span {
	slices.SortFunc(spans, func(a, b span) int { return bytes.Compare(a.first, b.first) })
	merged := spans[:0]
	for _, s := range spans {
		if n := len(merged); n > 0 {
			last := &merged[n-1]
			end, more := next(last.last)
			if !more || bytes.Compare(s.first, end) <= 0 {
				if bytes.Compare(s.last, last.last) > 0 {
					last.last = s.last
				}
				continue
			}
		}
		merged = append(merged, s)
	}
	return merged
}

// next is the key after b; false after the last.
func next(b []byte) ([]byte, bool) {
	b = bytes.Clone(b)
	for i := len(b) - 1; i >= 0; i-- {
		b[i]++
		if b[i] != 0 {
			return b, true
		}
	}
	return nil, false
}

// elements are the spans as an interval set holds them: where each begins, and
// where it ends but for one that goes to the last key.
func elements(spans []span) []nftables.SetElement {
	out := make([]nftables.SetElement, 0, 2*len(spans))
	for _, s := range spans {
		out = append(out, nftables.SetElement{Key: s.first})
		if end, more := next(s.last); more {
			out = append(out, nftables.SetElement{Key: end, IntervalEnd: true})
		}
	}
	return out
}
