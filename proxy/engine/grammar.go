package engine

// The character classes of RFC 9110 and RFC 3986 that the parsers use. Each
// table is a constant in all but name: written once, here.
var (
	// tokenChars: tchar (RFC 9110 5.6.2).
	tokenChars = charset("!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
	// hostChars: reg-name (RFC 3986 3.2.2) without percent-encodings and commas,
	// which no host has and lists are made of.
	hostChars = charset("!$&'()*+;=-._~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
	// targetChars: visible ASCII. Wider than RFC 3986, as policy has its own
	// rule for backslashes; bytes above 0x7e and controls are refused.
	targetChars = charrange(0x21, 0x7e)
	// valueChars: field-value: HTAB, SP, VCHAR, obs-text.
	valueChars = func() (t [256]bool) {
		t = charrange(0x20, 0xff)
		t['\t'], t[0x7f] = true, false
		return t
	}()
	// literalChars: what stands between the brackets of an IP literal.
	literalChars = charset("0123456789abcdefABCDEF:.")
	digits       = charset("0123456789")

	lowerTable = func() (t [256]byte) {
		for i := range t {
			t[i] = byte(i)
			if 'A' <= i && i <= 'Z' {
				t[i] = byte(i) + 'a' - 'A'
			}
		}
		return t
	}()
)

func charset(s string) (t [256]bool) {
	for i := range len(s) {
		t[s[i]] = true
	}
	return t
}

func charrange(from, to int) (t [256]bool) {
	for i := from; i <= to; i++ {
		t[i] = true
	}
	return t
}

// all reports whether s is made of the table's characters only.
func all[T string | []byte](t *[256]bool, s T) bool {
	for i := range len(s) {
		if !t[s[i]] {
			return false
		}
	}
	return true
}

func isHex(c byte) bool {
	return '0' <= c && c <= '9' || 'a' <= c && c <= 'f' || 'A' <= c && c <= 'F'
}

// equalLower compares a name of any case with one in lower case (ASCII only).
func equalLower(name, lower string) bool {
	if len(name) != len(lower) {
		return false
	}
	for i := range len(name) {
		if lowerTable[name[i]] != lower[i] {
			return false
		}
	}
	return true
}

// equalFold compares two strings, ignoring the case of ASCII letters.
func equalFold(a, b string) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range len(a) {
		if lowerTable[a[i]] != lowerTable[b[i]] {
			return false
		}
	}
	return true
}

// trimOWS removes optional white space (SP, HTAB) from both ends.
func trimOWS(s string) string {
	for s != "" && (s[0] == ' ' || s[0] == '\t') {
		s = s[1:]
	}
	for s != "" && (s[len(s)-1] == ' ' || s[len(s)-1] == '\t') {
		s = s[:len(s)-1]
	}
	return s
}

// parseLength reads a Content-Length: digits only, at most 18 of them.
func parseLength(s string) (int64, bool) {
	if s == "" || len(s) > 18 {
		return 0, false
	}
	var n int64
	for i := range len(s) {
		c := s[i] - '0'
		if c > 9 {
			return 0, false
		}
		n = n*10 + int64(c)
	}
	return n, true
}

// fieldKind is what the engine itself does about a field.
type fieldKind uint8

const (
	endToEnd fieldKind = iota
	hopByHop           // dropped without a look
	fieldHost
	fieldConnection
	fieldContentLength
	fieldTransferEncoding
	fieldUpgrade
	fieldExpect
	fieldTE
)

// kindOf classifies a field by name, in any case.
func kindOf(name string) fieldKind {
	switch len(name) {
	case 2:
		if equalLower(name, "te") {
			return fieldTE
		}
	case 4:
		if equalLower(name, "host") {
			return fieldHost
		}
	case 6:
		if equalLower(name, "expect") {
			return fieldExpect
		}
	case 7:
		if equalLower(name, "upgrade") {
			return fieldUpgrade
		}
	case 10:
		if equalLower(name, "connection") {
			return fieldConnection
		}
		if equalLower(name, "keep-alive") {
			return hopByHop
		}
	case 14:
		if equalLower(name, "content-length") {
			return fieldContentLength
		}
		if equalLower(name, "http2-settings") {
			return hopByHop
		}
	case 16:
		if equalLower(name, "proxy-connection") {
			return hopByHop
		}
	case 17:
		if equalLower(name, "transfer-encoding") {
			return fieldTransferEncoding
		}
	case 18:
		if equalLower(name, "proxy-authenticate") {
			return hopByHop
		}
	case 19:
		if equalLower(name, "proxy-authorization") {
			return hopByHop
		}
	}
	return endToEnd
}

// idempotent tells whether a method may be sent again (RFC 9110 9.2.2).
func idempotent(method string) bool {
	switch method {
	case "GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE":
		return true
	}
	return false
}
