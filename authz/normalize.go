package authz

import (
	"errors"
	"fmt"
	"strings"

	"castellan.dev/api/policy"
)

// maxPath bounds what NormalizePath reads; proxies bound headers far below.
const maxPath = 64 << 10

var errPathZero = errors.New("path holds %00")

// NormalizePath brings the path of a request into the form in which it is judged
// and forwarded (rule 24): decode, resolve dots, merge slashes, in one pass, so
// that nothing is decoded twice. The path is as received, without its query; a
// fragment is dropped. The caller answers an error with 400. A path that is
// normal already is returned as it is, without allocating.
//
// Refused under every option are control characters, spaces and %00; under every
// option but NONE also a '%' that is not followed by two hex digits, since what
// stands behind it could become an escape once the path is decoded.
func NormalizePath(option, rawPath string) (string, error) {
	path, _, _ := strings.Cut(rawPath, "#")
	if err := checkPath(path); err != nil {
		return "", err
	}
	var decode, merge bool
	switch option {
	case policy.NormalizeNone:
		return path, nil
	case policy.NormalizeBase, "":
	case policy.NormalizeMergeSlashes:
		merge = true
	case policy.NormalizeDecodeAndMergeSlashes:
		decode, merge = true, true
	default:
		return "", fmt.Errorf("unknown path normalization %q", option)
	}
	if path == "*" || isNormal(path, merge) {
		return path, nil
	}
	var stack [512]byte
	buf, err := decodePath(stack[:0], path, decode)
	if err != nil {
		return "", err
	}
	buf = resolveDots(buf)
	if merge {
		buf = mergeSlashes(buf)
	}
	if string(buf) == path {
		return path, nil
	}
	return string(buf), nil
}

// checkPath refuses what no option accepts.
func checkPath(path string) error {
	if len(path) > maxPath {
		return fmt.Errorf("path is longer than %d bytes", maxPath)
	}
	if path == "" || path[0] != '/' && path != "*" {
		return errors.New("path does not begin with '/'")
	}
	for i := range len(path) {
		switch c := path[i]; {
		case c <= ' ' || c == 0x7f:
			return errors.New("path holds a control character or space")
		case c == '?':
			return errors.New("path holds a query")
		case c == '%' && strings.HasPrefix(path[i:], "%00"):
			return errPathZero
		}
	}
	return nil
}

// isNormal reports whether nothing in the path could need work; escapes count as
// such.
func isNormal(path string, merge bool) bool {
	for i := range len(path) {
		switch path[i] {
		case '%', '\\':
			return false
		case '/':
			if i+1 < len(path) && (path[i+1] == '.' || merge && path[i+1] == '/') {
				return false
			}
		}
	}
	return true
}

// decodePath turns backslashes and decodes what is equivalent: unreserved
// characters always, escaped slashes and backslashes if told to.
func decodePath(buf []byte, path string, slashes bool) ([]byte, error) {
	for i := 0; i < len(path); i++ {
		c := path[i]
		switch {
		case c == '\\':
			buf = append(buf, '/')
		case c != '%':
			buf = append(buf, c)
		case i+2 >= len(path) || !isHex(path[i+1]) || !isHex(path[i+2]):
			return nil, errors.New("path holds a malformed percent-encoding")
		default:
			d := unhex(path[i+1])<<4 | unhex(path[i+2])
			switch {
			case isUnreserved(d):
				buf = append(buf, d)
			case slashes && (d == '/' || d == '\\'):
				buf = append(buf, '/')
			default:
				buf = append(buf, path[i:i+3]...)
			}
			i += 2
		}
	}
	return buf, nil
}

// resolveDots removes "." and ".." segments in place (RFC 3986, 5.2.4). Empty
// segments are segments.
func resolveDots(buf []byte) []byte {
	out := 0
	for i := 0; i < len(buf); {
		// buf[i] is the slash that begins a segment.
		end := i + 1
		for end < len(buf) && buf[end] != '/' {
			end++
		}
		seg := buf[i+1 : end]
		last := end == len(buf)
		switch string(seg) {
		case ".":
			if last {
				buf[out] = '/'
				out++
			}
		case "..":
			for out > 0 {
				out--
				if buf[out] == '/' {
					break
				}
			}
			if last {
				buf[out] = '/'
				out++
			}
		default:
			out += copy(buf[out:], buf[i:end])
		}
		i = end
	}
	return buf[:out]
}

func mergeSlashes(buf []byte) []byte {
	out := 0
	for i, c := range buf {
		if c == '/' && i > 0 && buf[i-1] == '/' {
			continue
		}
		buf[out] = c
		out++
	}
	return buf[:out]
}

func isUnreserved(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' ||
		c == '-' || c == '.' || c == '_' || c == '~'
}

func unhex(c byte) byte {
	switch {
	case c <= '9':
		return c - '0'
	case c <= 'F':
		return c - 'A' + 10
	default:
		return c - 'a' + 10
	}
}
