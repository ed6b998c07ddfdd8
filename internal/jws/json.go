package jws

import (
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"unicode/utf16"
	"unicode/utf8"
)

// maxDepth bounds how deep objects and arrays nest in a token.
const maxDepth = 32

var errJSON = errors.New("not JSON")

// parseObject reads one JSON object (RFC 8259) more strictly than
// encoding/json: duplicate member names, invalid UTF-8 and unpaired surrogates
// are errors, because two readers might disagree on what they mean. Numbers
// become json.Number. It exists because encoding/json keeps the last of two
// equal names silently, and because every token is read once.
func parseObject(data []byte) (map[string]any, error) {
	p := &parser{data: data}
	p.space()
	if p.peek() != '{' {
		return nil, fmt.Errorf("%w: an object is wanted", errJSON)
	}
	v, err := p.object(0)
	if err != nil {
		return nil, err
	}
	p.space()
	if p.pos != len(p.data) {
		return nil, fmt.Errorf("%w: data after the object", errJSON)
	}
	return v, nil
}

type parser struct {
	data []byte
	pos  int
}

// peek returns the next byte, 0 at the end; 0 is no token of JSON's grammar.
func (p *parser) peek() byte {
	if p.pos < len(p.data) {
		return p.data[p.pos]
	}
	return 0
}

func (p *parser) space() {
	for p.pos < len(p.data) {
		switch p.data[p.pos] {
		case ' ', '\t', '\n', '\r':
			p.pos++
		default:
			return
		}
	}
}

func (p *parser) fail(what string) error {
	return fmt.Errorf("%w: %s at byte %d", errJSON, what, p.pos)
}

func (p *parser) value(depth int) (any, error) {
	if depth > maxDepth {
		return nil, p.fail("nested too deep")
	}
	switch c := p.peek(); {
	case c == '{':
		return p.object(depth)
	case c == '[':
		return p.array(depth)
	case c == '"':
		return p.str()
	case c == '-' || c >= '0' && c <= '9':
		return p.number()
	case c == 't':
		return true, p.literal("true")
	case c == 'f':
		return false, p.literal("false")
	case c == 'n':
		return nil, p.literal("null")
	}
	return nil, p.fail("a value is wanted")
}

func (p *parser) literal(word string) error {
	if len(p.data)-p.pos < len(word) || string(p.data[p.pos:p.pos+len(word)]) != word {
		return p.fail("a value is wanted")
	}
	p.pos += len(word)
	return nil
}

func (p *parser) object(depth int) (map[string]any, error) {
	p.pos++ // {
	m := make(map[string]any, 8)
	p.space()
	if p.peek() == '}' {
		p.pos++
		return m, nil
	}
	for {
		p.space()
		if p.peek() != '"' {
			return nil, p.fail("a member name is wanted")
		}
		name, err := p.str()
		if err != nil {
			return nil, err
		}
		if _, dup := m[name]; dup {
			return nil, fmt.Errorf("%w: member %q stands twice", errJSON, name)
		}
		p.space()
		if p.peek() != ':' {
			return nil, p.fail("a colon is wanted")
		}
		p.pos++
		p.space()
		if m[name], err = p.value(depth + 1); err != nil {
			return nil, err
		}
		if done, err := p.next('}'); done || err != nil {
			return m, err
		}
	}
}

func (p *parser) array(depth int) ([]any, error) {
	p.pos++ // [
	p.space()
	if p.peek() == ']' {
		p.pos++
		return []any{}, nil
	}
	var list []any
	for {
		p.space()
		v, err := p.value(depth + 1)
		if err != nil {
			return nil, err
		}
		list = append(list, v)
		if done, err := p.next(']'); done || err != nil {
			return list, err
		}
	}
}

// next reads a comma, or the end of the list.
func (p *parser) next(end byte) (done bool, err error) {
	p.space()
	switch p.peek() {
	case ',':
		p.pos++
		return false, nil
	case end:
		p.pos++
		return true, nil
	}
	return false, p.fail("a comma or the end is wanted")
}

func (p *parser) digits() bool {
	start := p.pos
	for p.peek() >= '0' && p.peek() <= '9' {
		p.pos++
	}
	return p.pos > start
}

func (p *parser) number() (json.Number, error) {
	start := p.pos
	if p.peek() == '-' {
		p.pos++
	}
	if p.peek() == '0' {
		p.pos++
	} else if !p.digits() {
		return "", p.fail("a digit is wanted")
	}
	if p.peek() == '.' {
		p.pos++
		if !p.digits() {
			return "", p.fail("a digit is wanted")
		}
	}
	if p.peek() == 'e' || p.peek() == 'E' {
		p.pos++
		if p.peek() == '+' || p.peek() == '-' {
			p.pos++
		}
		if !p.digits() {
			return "", p.fail("a digit is wanted")
		}
	}
	return json.Number(p.data[start:p.pos]), nil
}

// str reads a string. The common one, without escapes, is copied in one piece.
func (p *parser) str() (string, error) {
	p.pos++ // "
	start := p.pos
	for p.pos < len(p.data) {
		switch c := p.data[p.pos]; {
		case c == '"':
			s := string(p.data[start:p.pos])
			p.pos++
			if !utf8.ValidString(s) {
				return "", p.fail("invalid UTF-8")
			}
			return s, nil
		case c == '\\':
			return p.escaped(append([]byte(nil), p.data[start:p.pos]...))
		case c < 0x20:
			return "", p.fail("a control character in a string")
		}
		p.pos++
	}
	return "", p.fail("an unfinished string")
}

// escaped goes on after the first backslash.
func (p *parser) escaped(buf []byte) (string, error) {
	for p.pos < len(p.data) {
		c := p.data[p.pos]
		p.pos++
		switch {
		case c == '"':
			if !utf8.Valid(buf) {
				return "", p.fail("invalid UTF-8")
			}
			return string(buf), nil
		case c < 0x20:
			return "", p.fail("a control character in a string")
		case c != '\\':
			buf = append(buf, c)
		default:
			var err error
			if buf, err = p.escape(buf); err != nil {
				return "", err
			}
		}
	}
	return "", p.fail("an unfinished string")
}

func (p *parser) escape(buf []byte) ([]byte, error) {
	c := p.peek()
	p.pos++
	switch c {
	case '"', '\\', '/':
		return append(buf, c), nil
	case 'b':
		return append(buf, '\b'), nil
	case 'f':
		return append(buf, '\f'), nil
	case 'n':
		return append(buf, '\n'), nil
	case 'r':
		return append(buf, '\r'), nil
	case 't':
		return append(buf, '\t'), nil
	case 'u':
		r, err := p.hex4()
		if err != nil {
			return nil, err
		}
		if utf16.IsSurrogate(r) {
			if p.literal(`\u`) != nil {
				return nil, p.fail("an unpaired surrogate")
			}
			low, err := p.hex4()
			if err != nil {
				return nil, err
			}
			if r = utf16.DecodeRune(r, low); r == utf8.RuneError {
				return nil, p.fail("an unpaired surrogate")
			}
		}
		return utf8.AppendRune(buf, r), nil
	}
	return nil, p.fail("an unknown escape")
}

func (p *parser) hex4() (rune, error) {
	if len(p.data)-p.pos < 4 {
		return 0, p.fail("an unfinished escape")
	}
	v, err := strconv.ParseUint(string(p.data[p.pos:p.pos+4]), 16, 16)
	if err != nil {
		return 0, p.fail("a bad escape")
	}
	p.pos += 4
	return rune(v), nil
}
