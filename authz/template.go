package authz

import (
	"errors"
	"strings"
)

// segment is one piece of a path template between slashes.
type segment struct {
	literal string
	op      templateOp
}

type templateOp uint8

const (
	opLiteral templateOp = iota
	opOne                // {*}: one segment, not empty
	opRest               // {**}: any run of characters, slashes included
)

const (
	tokenOne  = "{*}"
	tokenRest = "{**}"
)

// parsePath reads a value of paths: a template if it holds an operator, else an
// ordinary value. A brace outside an operator is refused in either (rule 10).
func parsePath(v string) (pattern, error) {
	if !strings.ContainsAny(v, "{}") {
		return parseString(v, patNonEmpty)
	}
	if v[0] != '/' {
		return pattern{}, errors.New("a path with '{' or '}' is a template and begins with '/'")
	}
	var segs []segment
	rest := false
	for part := range strings.SplitSeq(v[1:], "/") {
		switch {
		case (part == tokenOne || part == tokenRest) && rest:
			return pattern{}, errors.New("{**} must be the last operator")
		case part == tokenOne:
			segs = append(segs, segment{op: opOne})
		case part == tokenRest:
			rest = true
			segs = append(segs, segment{op: opRest})
		case strings.ContainsAny(part, "{}"):
			return pattern{}, errBraces
		case !validLiteral(part):
			return pattern{}, errors.New("a literal segment of a template holds RFC 3986 path characters only")
		default:
			segs = append(segs, segment{literal: part})
		}
	}
	return pattern{kind: patTemplate, text: v, tmpl: segs}, nil
}

// validLiteral reports whether s consists of pchar (RFC 3986, 3.3) without the
// star, which would read like a wildcard.
func validLiteral(s string) bool {
	for i := 0; i < len(s); i++ {
		c := s[i]
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9':
		case strings.IndexByte("-._~!$&'()+,;=:@", c) >= 0:
		case c == '%' && i+2 < len(s) && isHex(s[i+1]) && isHex(s[i+2]):
			i += 2
		default:
			return false
		}
	}
	return true
}

// matchTemplate compares a path with a template. A segment of the path is any
// run of characters but "/", so that no odd raw character slips past a DENY.
func matchTemplate(segs []segment, path string) bool {
	for i, seg := range segs {
		if path == "" || path[0] != '/' {
			return false
		}
		path = path[1:]
		switch seg.op {
		case opRest:
			return matchTail(segs[i+1:], path)
		case opOne:
			n := strings.IndexByte(path, '/')
			if n < 0 {
				n = len(path)
			}
			if n == 0 {
				return false
			}
			path = path[n:]
		default:
			if !strings.HasPrefix(path, seg.literal) {
				return false
			}
			path = path[len(seg.literal):]
			if path != "" && path[0] != '/' {
				return false
			}
		}
	}
	return path == ""
}

// matchTail compares what follows {**}, literals only, with the end of the path:
// /store/{**}/cart takes /store//cart, but not /store/cart, in which the slash
// before and the one after would be the same.
func matchTail(segs []segment, path string) bool {
	for i := len(segs) - 1; i >= 0; i-- {
		lit := segs[i].literal
		if !strings.HasSuffix(path, lit) {
			return false
		}
		path = path[:len(path)-len(lit)]
		if path == "" || path[len(path)-1] != '/' {
			return false
		}
		path = path[:len(path)-1]
	}
	return true
}

func isHex(c byte) bool {
	return c >= '0' && c <= '9' || c >= 'a' && c <= 'f' || c >= 'A' && c <= 'F'
}
