package engine

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

	conn   *Conn
	fields []Field
	judged bool
	values []string
}

// Conn returns the connection the request came on.
func (r *Request) Conn() *Conn { return r.conn }

// Judged tells whether Begin was called for this request.
func (r *Request) Judged() bool { return r.judged }

// Values returns every value of the named field, which is given in lower case;
// nil when there is none. ":authority", "host", ":method" and ":path" work too.
// Hop-by-hop fields are gone already. It does not allocate in steady state.
// Results stay valid until End. Not for concurrent use.
func (r *Request) Values(lowerName string) []string { return nil }

// Fields returns the fields as they would be forwarded, before the verdict. Do not change them.
func (r *Request) Fields() []Field { return r.fields }
