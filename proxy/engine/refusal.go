package engine

import "net/http"

// refusal is why a message is not served. The text is for logs; peers see the
// status's own text only.
type refusal struct {
	status int
	reason string
	text   string
}

// Error returns the text for logs.
func (r *refusal) Error() string { return "engine: " + r.text }

func malformed(text string) *refusal {
	return &refusal{http.StatusBadRequest, ReasonMalformed, text}
}

// Constant refusals: nothing of the input is quoted, so none of it reaches a log unbounded.
var (
	errBareLF          = malformed("bare line feed")
	errRequestLine     = malformed("malformed request line")
	errMethod          = malformed("method is not an upper-case token")
	errConnect         = &refusal{http.StatusMethodNotAllowed, ReasonMethod, "CONNECT is not served"}
	errVersion         = &refusal{http.StatusHTTPVersionNotSupported, ReasonVersion, "HTTP version not supported"}
	errTarget          = malformed("malformed request target")
	errTargetEncoding  = malformed("invalid percent-encoding in the path")
	errTargetNUL       = malformed("%00 in the path")
	errTargetTooLong   = &refusal{http.StatusRequestURITooLong, ReasonTooLarge, "request target too long"}
	errHeadTooLarge    = &refusal{http.StatusRequestHeaderFieldsTooLarge, ReasonTooLarge, "request head too large"}
	errTooManyFields   = &refusal{http.StatusRequestHeaderFieldsTooLarge, ReasonTooLarge, "too many fields"}
	errHeadTimeout     = &refusal{http.StatusRequestTimeout, ReasonHeaderTimeout, "request head not complete in time"}
	errFolded          = malformed("folded field line")
	errFieldName       = malformed("malformed field name")
	errUnderscore      = malformed("underscore in a field name")
	errFieldValue      = malformed("malformed field value")
	errNoHost          = malformed("no Host")
	errManyHosts       = malformed("more than one Host")
	errHost            = malformed("malformed Host")
	errHostMismatch    = malformed("Host differs from the target's authority")
	errLength          = malformed("malformed Content-Length")
	errManyLengths     = malformed("more than one Content-Length")
	errLengthAndCoding = malformed("Content-Length and Transfer-Encoding")
	errCoding          = malformed("Transfer-Encoding is not just chunked")
	errUnknownCoding   = &refusal{http.StatusNotImplemented, ReasonMalformed, "unknown transfer coding"}
	errManyCodings     = malformed("more than one Transfer-Encoding")
	errCodingIn10      = malformed("Transfer-Encoding in HTTP/1.0")
	errConnectionField = malformed("Connection names a field that a message needs")
	errExpect          = &refusal{http.StatusExpectationFailed, ReasonMalformed, "unknown expectation"}

	errStatusLine     = malformed("malformed status line")
	errSwitch         = malformed("upstream switched protocols unasked")
	errTooManyInforms = malformed("too many informational responses")

	errChunkSize    = malformed("malformed chunk size")
	errChunkEnd     = malformed("chunk does not end with CRLF")
	errChunkLine    = malformed("chunk extensions too long")
	errTrailerLarge = malformed("trailers too large")
)
