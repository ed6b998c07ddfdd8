package engine

import (
	"bytes"
	"strings"
)

// Proto is the HTTP version a client spoke.
type Proto uint8

// The versions served.
const (
	HTTP11 Proto = iota
	HTTP10
	HTTP2
)

// String returns the version as a log shows it.
func (p Proto) String() string {
	switch p {
	case HTTP10:
		return "HTTP/1.0"
	case HTTP2:
		return "HTTP/2"
	default:
		return "HTTP/1.1"
	}
}

// Request is one request as the Session sees it. It and every string in it (the
// results of its methods too) are valid until End returns: the memory is used
// again for the next request. Whoever keeps a string longer clones it.
type Request struct {
	// Method is a token without lower-case letters; CONNECT never comes here.
	Method string
	// Target is the request target as received.
	Target string
	// Path is the target's path as received: it begins with "/", or is "*" for
	// OPTIONS. It holds no query, no fragment, no "%00" and only valid percent-encodings.
	Path string
	// RawQuery is what follows "?", without a fragment; HasQuery tells "/a?" from "/a".
	RawQuery string
	HasQuery bool
	// Host is the authority: exactly one, never empty, as received.
	Host  string
	Proto Proto
	// ContentLength is the body's length, 0 for none, -1 when not known in advance.
	ContentLength int64
	// WebSocket: the client asks for an upgrade to it.
	WebSocket bool
	// Aux is the Session's: nil at Begin, the same value at Dial and End.
	Aux any

	conn    *Conn
	fields  []Field
	judged  bool
	expect  bool // 100-continue
	framing framing
	values  []string // arena for Values
	// abort ends an HTTP/2 request's stream.
	abort func()
}

// Conn returns the connection the request came on.
func (r *Request) Conn() *Conn { return r.conn }

// Abort ends a request in flight without an answer: HTTP/2 resets its stream,
// HTTP/1 closes the connection, and what went upstream ends with it. The Session
// may call it from any goroutine between Begin and the return of End, which still
// comes. It does not wait for the peer.
func (r *Request) Abort() {
	if r.abort != nil {
		r.abort()
		return
	}
	r.conn.CloseNow()
}

// Judged tells whether Begin was called for this request.
func (r *Request) Judged() bool { return r.judged }

// Fields returns the end-to-end fields as they would be forwarded, before the
// verdict; Host is not among them. Do not change them. Unlike Values they may be
// read from any goroutine between Begin and the return of End.
func (r *Request) Fields() []Field { return r.fields }

// Values returns every value of the named field, which is given in lower case;
// nil when there is none. ":authority", "host", ":method" and ":path" work too.
// Hop-by-hop fields are gone already. It does not allocate in steady state.
// Results stay valid until End. Not for concurrent use.
func (r *Request) Values(lowerName string) []string {
	start := len(r.values)
	switch lowerName {
	case ":authority", "host":
		r.values = append(r.values, r.Host)
	case ":method":
		r.values = append(r.values, r.Method)
	case ":path":
		r.values = append(r.values, r.Target)
	case "upgrade":
		if r.WebSocket {
			r.values = append(r.values, "websocket")
		}
	default:
		for i := range r.fields {
			if equalLower(r.fields[i].Name, lowerName) {
				r.values = append(r.values, r.fields[i].Value)
			}
		}
	}
	if len(r.values) == start {
		return nil
	}
	return r.values[start:len(r.values):len(r.values)]
}

// reset makes r ready for the next request, keeping its slices.
func (r *Request) reset(c *Conn) {
	clear(r.fields)
	clear(r.values)
	*r = Request{conn: c, fields: r.fields[:0], values: r.values[:0]}
}

// parse reads a whole HTTP/1 head, whose lines scan has found.
func (r *Request) parse(b []byte, scan *headScan, cfg *Config) error {
	r.framing.length = -1
	authority, err := r.parseLine(scan.line(b, 0), cfg)
	if err != nil {
		return err
	}
	for i := 1; i < scan.count(); i++ {
		field, err := splitField(scan.line(b, i))
		if err != nil {
			return err
		}
		if err := r.add(field); err != nil {
			return err
		}
	}
	if r.framing.nominated {
		r.fields = dropNominated(scan, b, r.fields)
	}
	return r.settle(authority)
}

// add takes one field; those of the hop go no further.
func (r *Request) add(field Field) error {
	if underscored(field.Name) {
		return errUnderscore
	}
	kind := kindOf(field.Name)
	switch kind {
	case endToEnd:
		r.fields = append(r.fields, field)
		return nil
	case fieldHost:
		if r.Host != "" {
			return errManyHosts
		}
		if !validHost(field.Value) {
			return errHost
		}
		r.Host = field.Value
		return nil
	case fieldExpect:
		if !equalLower(field.Value, "100-continue") {
			return errExpect
		}
		r.expect = true
		return nil
	}
	_, err := r.framing.note(field, kind)
	return err
}

// settle checks what only the whole head shows.
func (r *Request) settle(authority string) error {
	f := &r.framing
	switch {
	case r.Host == "":
		return errNoHost
	case authority != "" && !equalFold(authority, r.Host):
		return errHostMismatch
	case f.codings > 0 && f.length >= 0:
		return errLengthAndCoding
	case f.codings > 0 && r.Proto == HTTP10:
		return errCodingIn10
	}
	r.ContentLength = max(f.length, 0)
	if f.chunked {
		r.ContentLength = -1
	}
	if r.Proto == HTTP10 || r.ContentLength == 0 {
		r.expect = false // RFC 9110 10.1.1: ignored
	}
	r.WebSocket = f.upgrade && f.websocket && r.Method == "GET" && r.Proto == HTTP11 && r.ContentLength == 0
	return nil
}

// parseLine reads "METHOD SP target SP HTTP/1.x" and returns the authority of an absolute target.
func (r *Request) parseLine(line []byte, cfg *Config) (authority string, err error) {
	sp := bytes.IndexByte(line, ' ')
	last := bytes.LastIndexByte(line, ' ')
	if sp <= 0 || last <= sp {
		return "", errRequestLine
	}
	if err := r.setMethod(text(line[:sp])); err != nil {
		return "", err
	}
	switch version := text(line[last+1:]); version {
	case "HTTP/1.1":
		r.Proto = HTTP11
	case "HTTP/1.0":
		r.Proto = HTTP10
	default:
		if strings.HasPrefix(version, "HTTP/") {
			return "", errVersion
		}
		return "", errRequestLine
	}
	return r.setTarget(text(line[sp+1:last]), cfg)
}

func (r *Request) setMethod(method string) error {
	for i := range len(method) {
		if c := method[i]; !tokenChars[c] || 'a' <= c && c <= 'z' {
			return errMethod
		}
	}
	if len(method) == 0 || len(method) > 32 {
		return errMethod
	}
	if method == "CONNECT" {
		return errConnect
	}
	r.Method = method
	return nil
}

// setTarget splits a request target (RFC 9112 3.2): origin form, absolute form,
// or "*" for OPTIONS. A fragment is dropped.
func (r *Request) setTarget(target string, cfg *Config) (authority string, err error) {
	switch {
	case len(target) > cfg.MaxTargetBytes:
		return "", errTargetTooLong
	case len(target) == 0 || !all(&targetChars, target):
		return "", errTarget
	}
	r.Target = target
	rest := target
	if i := strings.IndexByte(rest, '#'); i >= 0 {
		rest = rest[:i]
	}
	if rest == "" {
		return "", errTarget
	}
	if rest[0] != '/' {
		if rest == "*" && r.Method == "OPTIONS" {
			r.Path = rest
			return "", nil
		}
		if authority, rest, err = splitAbsolute(rest); err != nil {
			return "", err
		}
	}
	r.Path, r.RawQuery, r.HasQuery = strings.Cut(rest, "?")
	if r.Path == "" {
		r.Path = "/"
		if r.Method == "OPTIONS" && !r.HasQuery {
			r.Path = "*" // RFC 9112 3.2.4
		}
	}
	return authority, checkEncoding(r.Path)
}

// splitAbsolute takes "http://authority" off a target.
func splitAbsolute(target string) (authority, rest string, err error) {
	scheme, rest, ok := strings.Cut(target, "://")
	if !ok || !equalLower(scheme, "http") && !equalLower(scheme, "https") {
		return "", "", errTarget
	}
	end := strings.IndexAny(rest, "/?")
	if end < 0 {
		end = len(rest)
	}
	authority, rest = rest[:end], rest[end:]
	if !validHost(authority) {
		return "", "", errTarget
	}
	return authority, rest, nil
}

// checkEncoding refuses a "%" without two digits after it, and an encoded NUL.
func checkEncoding(path string) error {
	for i := strings.IndexByte(path, '%'); i >= 0; {
		if len(path) < i+3 || !isHex(path[i+1]) || !isHex(path[i+2]) {
			return errTargetEncoding
		}
		if path[i+1] == '0' && path[i+2] == '0' {
			return errTargetNUL
		}
		path = path[i+3:]
		i = strings.IndexByte(path, '%')
	}
	return nil
}

// validHost checks an authority: a name or IP literal, and perhaps a port. The
// Session judges the string as a whole.
func validHost(host string) bool {
	if host == "" || len(host) > 255+len(":65535") {
		return false
	}
	name, port := host, ""
	if i := strings.LastIndexByte(host, ':'); i > strings.LastIndexByte(host, ']') {
		name, port = host[:i], host[i+1:]
	}
	if !all(&digits, port) {
		return false
	}
	if n := len(name); n > 2 && name[0] == '[' && name[n-1] == ']' {
		return all(&literalChars, name[1:n-1])
	}
	return name != "" && all(&hostChars, name)
}
