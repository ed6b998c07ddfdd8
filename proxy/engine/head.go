package engine

import (
	"bytes"
	"unsafe"
)

// headScan finds the lines of a head in a buffer that fills piecemeal.
type headScan struct {
	starts []int32 // where each line begins
	pos    int     // where the unfinished line begins
}

func (h *headScan) reset() { h.starts, h.pos = h.starts[:0], 0 }

// scan looks for the empty line that ends a head in b, which begins with the
// head, and returns the head's length, or 0 while it is incomplete.
func (h *headScan) scan(b []byte, maxLines int) (int, error) {
	for {
		i := bytes.IndexByte(b[h.pos:], '\n')
		if i < 0 {
			return 0, nil
		}
		if i == 0 || b[h.pos+i-1] != '\r' {
			return 0, errBareLF
		}
		start := h.pos
		h.pos += i + 1
		if i == 1 {
			if len(h.starts) == 0 {
				return 0, errRequestLine
			}
			h.starts = append(h.starts, int32(start))
			return h.pos, nil
		}
		if len(h.starts) > maxLines {
			return 0, errTooManyFields
		}
		h.starts = append(h.starts, int32(start))
	}
}

// line returns the i-th line without its CRLF; the last start is the empty line's.
func (h *headScan) line(b []byte, i int) []byte { return b[h.starts[i] : h.starts[i+1]-2] }

// count is the number of lines before the empty one.
func (h *headScan) count() int { return len(h.starts) - 1 }

// text views bytes of a pooled buffer as a string: valid until the buffer is
// used again, which for a request is after End.
func text(b []byte) string { return unsafe.String(unsafe.SliceData(b), len(b)) }

// splitField parses "name: value" (RFC 9112 5).
func splitField(line []byte) (Field, error) {
	if line[0] == ' ' || line[0] == '\t' {
		return Field{}, errFolded
	}
	colon := bytes.IndexByte(line, ':')
	if colon <= 0 || !all(&tokenChars, line[:colon]) {
		return Field{}, errFieldName // includes white space before the colon
	}
	value := line[colon+1:]
	if !all(&valueChars, value) {
		return Field{}, errFieldValue
	}
	return Field{text(line[:colon]), trimOWS(text(value))}, nil
}

// framing is what a head says about the message's body and connection.
type framing struct {
	length    int64 // of Content-Length; -1: none was given
	chunked   bool
	codings   int // Transfer-Encoding fields seen
	close     bool
	keepAlive bool
	upgrade   bool // Connection: upgrade
	websocket bool // Upgrade: websocket
	trailers  bool // TE: trailers
	nominated bool // Connection names other fields
}

// note takes a field that concerns the message or the hop; it reports whether
// the field is one that travels on.
func (f *framing) note(field Field, kind fieldKind) (bool, error) {
	switch kind {
	case fieldContentLength:
		if f.length >= 0 {
			return false, errManyLengths
		}
		n, ok := parseLength(field.Value)
		if !ok {
			return false, errLength
		}
		f.length = n
	case fieldTransferEncoding:
		if f.codings++; f.codings > 1 {
			return false, errManyCodings
		}
		return false, f.noteCoding(field.Value)
	case fieldConnection:
		return false, f.noteConnection(field.Value)
	case fieldUpgrade:
		// Only a plain "websocket" is ever forwarded; a list is not one.
		f.websocket = equalLower(field.Value, "websocket")
	case fieldTE:
		f.trailers = f.trailers || equalLower(field.Value, "trailers")
	}
	return kind == endToEnd, nil
}

func (f *framing) noteCoding(value string) error {
	switch {
	case equalLower(value, "chunked"):
		f.chunked = true
		return nil
	case len(value) > len("chunked") && equalLower(value[len(value)-len("chunked"):], "chunked"):
		return errUnknownCoding
	}
	return errCoding
}

// noteConnection reads Connection's options. Fields that a message cannot be
// understood without must not be nominated.
func (f *framing) noteConnection(value string) error {
	for value != "" {
		var option string
		option, value = cutOption(value)
		switch {
		case option == "":
		case equalLower(option, "close"):
			f.close = true
		case equalLower(option, "keep-alive"):
			f.keepAlive = true
		case equalLower(option, "upgrade"):
			f.upgrade = true
		default:
			switch kindOf(option) {
			case fieldHost, fieldContentLength, fieldTransferEncoding, fieldConnection:
				return errConnectionField
			case endToEnd:
				f.nominated = true
			}
		}
	}
	return nil
}

// cutOption takes the first element of a comma-separated list.
func cutOption(list string) (option, rest string) {
	for i := range len(list) {
		if list[i] == ',' {
			return trimOWS(list[:i]), list[i+1:]
		}
	}
	return trimOWS(list), ""
}

// dropNominated removes the fields that Connection's options name. The head is
// read again, as this is rare.
func dropNominated(scan *headScan, b []byte, fields []Field) []Field {
	for i := 1; i < scan.count(); i++ {
		field, err := splitField(scan.line(b, i))
		if err != nil || kindOf(field.Name) != fieldConnection {
			continue
		}
		for list := field.Value; list != ""; {
			var option string
			option, list = cutOption(list)
			fields = dropField(fields, option)
		}
	}
	return fields
}

// dropField removes the named fields in place; the name may be in any case.
func dropField(fields []Field, name string) []Field {
	kept := fields[:0]
	for _, f := range fields {
		if !equalFold(f.Name, name) {
			kept = append(kept, f)
		}
	}
	return kept
}
