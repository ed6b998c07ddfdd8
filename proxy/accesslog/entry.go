package accesslog

import (
	"strconv"
	"time"
	"unicode/utf8"
)

// maxString bounds one value of a peer's making, in bytes.
const maxString = 1024

// Entry is one line. Empty fields are left out.
type Entry struct {
	Start     time.Time
	Direction string
	// Protocol is HTTP/1.1, HTTP/2, HTTP/1.0 or TCP.
	Protocol string
	// Peer is the verified SPIFFE ID of the other side, empty for plaintext.
	Peer   string
	Source string
	// Destination is the service or application it went to.
	Destination        string
	Method, Host, Path string
	// Status of the response; 0 is left out.
	Status                   int
	BytesReceived, BytesSent int64
	Duration                 time.Duration
	GRPCStatus               string
	Reason                   string
	Policy                   string
	Rule                     int
	Shadow                   string
	Error                    error
	RequestID, TraceParent   string
}

// append formats e as one line.
func (e *Entry) append(b []byte, clock *stamp) []byte {
	b = append(b, `{"time":"`...)
	b = clock.append(b, e.Start)
	b = append(b, `","direction":"`...)
	b = append(b, e.Direction...)
	b = append(b, `","protocol":"`...)
	b = append(b, e.Protocol...)
	b = append(b, '"')
	b = field(b, `,"peer":`, e.Peer)
	b = field(b, `,"source":`, e.Source)
	b = field(b, `,"destination":`, e.Destination)
	b = field(b, `,"method":`, e.Method)
	b = field(b, `,"host":`, e.Host)
	b = field(b, `,"path":`, e.Path)
	if e.Status != 0 {
		b = append(b, `,"status":`...)
		b = strconv.AppendInt(b, int64(e.Status), 10)
	}
	b = append(b, `,"bytesReceived":`...)
	b = strconv.AppendInt(b, e.BytesReceived, 10)
	b = append(b, `,"bytesSent":`...)
	b = strconv.AppendInt(b, e.BytesSent, 10)
	b = append(b, `,"durationMs":`...)
	b = millis(b, e.Duration)
	b = field(b, `,"grpcStatus":`, e.GRPCStatus)
	b = field(b, `,"reason":`, e.Reason)
	if e.Policy != "" {
		b = field(b, `,"policy":`, e.Policy)
		if e.Rule >= 0 {
			b = append(b, `,"rule":`...)
			b = strconv.AppendInt(b, int64(e.Rule), 10)
		}
	}
	b = field(b, `,"shadow":`, e.Shadow)
	if e.Error != nil {
		b = field(b, `,"error":`, e.Error.Error())
	}
	b = field(b, `,"requestId":`, e.RequestID)
	b = field(b, `,"traceparent":`, e.TraceParent)
	return append(b, "}\n"...)
}

func field(b []byte, name, value string) []byte {
	if value == "" {
		return b
	}
	b = append(b, name...)
	return quote(b, value)
}

// millis writes d in milliseconds with microseconds after the point.
func millis(b []byte, d time.Duration) []byte {
	us := max(d.Microseconds(), 0)
	b = strconv.AppendInt(b, us/1000, 10)
	frac := us % 1000
	return append(b, '.', byte('0'+frac/100), byte('0'+frac/10%10), byte('0'+frac%10))
}

const hexDigits = "0123456789abcdef"

// quote appends s as a JSON string; what is not UTF-8 becomes U+FFFD.
func quote(b []byte, s string) []byte {
	cut := len(s) > maxString
	if cut {
		s = s[:maxString]
	}
	b = append(b, '"')
	start := 0
	for i := 0; i < len(s); {
		c := s[i]
		if c >= ' ' && c != '"' && c != '\\' && c < utf8.RuneSelf {
			i++
			continue
		}
		if c >= utf8.RuneSelf {
			r, size := utf8.DecodeRuneInString(s[i:])
			// U+2028 and U+2029 end lines in some readers.
			if (r != utf8.RuneError || size != 1) && r != '\u2028' && r != '\u2029' {
				i += size
				continue
			}
			b = append(append(b, s[start:i]...), `\ufffd`...)
			i += size
			start = i
			continue
		}
		b = append(b, s[start:i]...)
		if c == '"' || c == '\\' {
			b = append(b, '\\', c)
		} else {
			b = append(b, '\\', 'u', '0', '0', hexDigits[c>>4], hexDigits[c&15])
		}
		i++
		start = i
	}
	b = append(b, s[start:]...)
	if cut {
		b = append(b, "..."...)
	}
	return append(b, '"')
}

// stamp formats times, and keeps the part up to the second.
type stamp struct {
	second int64
	text   []byte
}

func (s *stamp) append(b []byte, t time.Time) []byte {
	if sec := t.Unix(); sec != s.second || s.text == nil {
		s.second = sec
		s.text = t.UTC().AppendFormat(s.text[:0], "2006-01-02T15:04:05.")
	}
	b = append(b, s.text...)
	us := t.Nanosecond() / 1000
	for div := 100_000; div > 0; div /= 10 {
		b = append(b, byte('0'+us/div%10))
	}
	return append(b, 'Z')
}
