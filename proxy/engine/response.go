package engine

import "net/http"

// response is an upstream's head. Its strings are valid until the upstream
// connection is read again, so the head is written on before that.
type response struct {
	status  int
	reason  string
	fields  []Field // end-to-end, without Content-Length
	length  int64   // Content-Length; -1: none
	mode    bodyMode
	keep    bool // the connection can be used again
	framing framing
}

func (s *response) reset() {
	clear(s.fields)
	*s = response{fields: s.fields[:0], length: -1}
}

// parse reads a whole HTTP/1 response head.
func (s *response) parse(b []byte, scan *headScan, method string) error {
	s.reset()
	s.framing.length = -1
	http10, err := s.parseLine(scan.line(b, 0))
	if err != nil {
		return err
	}
	for i := 1; i < scan.count(); i++ {
		field, err := splitField(scan.line(b, i))
		if err != nil {
			return err
		}
		kind := kindOf(field.Name)
		if kind == fieldExpect || kind == fieldHost {
			kind = endToEnd // mean nothing in a response
		}
		travels, err := s.framing.note(field, kind)
		if err != nil {
			return err
		}
		if travels {
			s.fields = append(s.fields, field)
		}
	}
	if s.framing.nominated {
		s.fields = dropNominated(scan, b, s.fields)
	}
	return s.settle(http10, method)
}

func (s *response) parseLine(line []byte) (http10 bool, err error) {
	const version = len("HTTP/1.x ")
	if len(line) < version+3 || len(line) > version+3 && line[version+3] != ' ' || !all(&valueChars, line) {
		return false, errStatusLine
	}
	switch text(line[:version]) {
	case "HTTP/1.1 ":
	case "HTTP/1.0 ":
		http10 = true
	default:
		return false, errStatusLine
	}
	for _, c := range line[version : version+3] {
		if c < '0' || c > '9' {
			return false, errStatusLine
		}
		s.status = s.status*10 + int(c-'0')
	}
	if s.status < 100 || s.status > 599 {
		return false, errStatusLine
	}
	if len(line) > version+4 {
		s.reason = text(line[version+4:])
	}
	return http10, nil
}

// settle decides the body's framing (RFC 9112 6.3).
func (s *response) settle(http10 bool, method string) error {
	f := &s.framing
	switch {
	case f.codings > 0 && f.length >= 0:
		return errLengthAndCoding
	case f.codings > 0 && http10:
		return errCodingIn10
	}
	s.length = f.length
	s.keep = !f.close && (!http10 || f.keepAlive)
	switch {
	case bodyless(method, s.status):
		s.mode = noBody
	case f.chunked:
		s.mode = byChunks
	case f.length >= 0:
		s.mode = byLength
	default:
		s.mode = untilClose
		s.keep = false
	}
	return nil
}

// informational tells 1xx from final responses; 101 is final here.
func (s *response) informational() bool {
	return s.status < 200 && s.status != http.StatusSwitchingProtocols
}

func bodyless(method string, status int) bool {
	return method == "HEAD" || status < 200 || status == http.StatusNoContent || status == http.StatusNotModified
}

// forbiddenTrailer names what must not arrive after the head (RFC 9110 6.5.1):
// framing, routing, authentication and request modifiers.
func forbiddenTrailer(name string) bool {
	if kindOf(name) != endToEnd {
		return true
	}
	switch len(name) {
	case 3:
		return equalLower(name, "age")
	case 4:
		return equalLower(name, "date") || equalLower(name, "vary")
	case 6:
		return equalLower(name, "cookie") || equalLower(name, "accept")
	case 7:
		return equalLower(name, "trailer") || equalLower(name, "expires")
	case 8:
		return equalLower(name, "location")
	case 10:
		return equalLower(name, "set-cookie")
	case 12:
		return equalLower(name, "content-type") || equalLower(name, "max-forwards")
	case 13:
		return equalLower(name, "authorization") || equalLower(name, "cache-control") || equalLower(name, "content-range")
	case 16:
		return equalLower(name, "content-encoding") || equalLower(name, "www-authenticate")
	}
	return false
}
