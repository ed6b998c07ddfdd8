package authz

import (
	"errors"
	"strconv"
	"strings"
)

// attr is something about a peer or a request that policies ask for. Those up to
// attrSNI are fixed by the connection.
type attr uint8

const (
	attrPrincipal attr = iota
	attrAccount
	attrNamespace
	attrTrustDomain
	attrSourceIP
	attrDestinationIP
	attrPort
	attrSNI

	attrPath
	attrHost
	attrSubject // request principal
	attrClaim
	attrAuthority // Host as received
	attrHeader
	attrRemoteIP
	attrMethod
)

// fixed says whether the connection fixes the attribute. What trusted proxies
// tell of the client may differ per request.
func (a attr) fixed() bool { return a <= attrSNI }

// httpOnly says whether the attribute means nothing on TCP (rule 19).
func (a attr) httpOnly() bool { return a > attrSNI && a != attrRemoteIP }

// ref names an attribute wholly: which header, which claim.
type ref struct {
	attr  attr
	name  string
	claim []string
}

// id is comparable; no claim name holds NUL (parseClaim).
func (r ref) id() string {
	return string(rune(r.attr)) + r.name + "\x00" + strings.Join(r.claim, "\x00")
}

// parse reads one value of the attribute.
func (r ref) parse(value, policyNamespace string) (pattern, error) {
	switch r.attr {
	case attrNamespace:
		return parseGlob(value)
	case attrAccount:
		return parseAccount(value, policyNamespace)
	case attrTrustDomain:
		return parseTrustDomain(value)
	case attrSourceIP, attrDestinationIP, attrRemoteIP:
		return parseNet(value)
	case attrPort:
		return parsePort(value)
	case attrPath:
		return parsePath(value)
	case attrHost:
		return parseString(asciiLower(value), patAny)
	case attrSNI:
		return parseString(asciiLower(value), patNonEmpty)
	case attrMethod, attrHeader, attrAuthority:
		return parseString(value, patAny)
	case attrSubject:
		return parseSubject(value)
	default:
		return parseString(value, patNonEmpty)
	}
}

const (
	headersKey = "request.headers["
	claimsKey  = "request.auth.claims["
)

// parseKey reads the key of a condition (rule 17). Dynamic metadata of Envoy's
// filters (experimental.envoy.filters.*) does not exist here, so its keys are
// unknown, and fail closed as such.
func parseKey(key string) (ref, error) {
	switch key {
	case "source.ip":
		return ref{attr: attrSourceIP}, nil
	case "remote.ip":
		return ref{attr: attrRemoteIP}, nil
	case "source.namespace":
		return ref{attr: attrNamespace}, nil
	case "source.principal":
		return ref{attr: attrPrincipal}, nil
	case "source.serviceAccount":
		return ref{attr: attrAccount}, nil
	case "source.trustDomain":
		return ref{attr: attrTrustDomain}, nil
	case "request.auth.principal":
		return ref{attr: attrSubject}, nil
	case "request.auth.audiences":
		return ref{attr: attrClaim, claim: []string{"aud"}}, nil
	case "request.auth.presenter":
		return ref{attr: attrClaim, claim: []string{"azp"}}, nil
	case "destination.ip":
		return ref{attr: attrDestinationIP}, nil
	case "destination.port":
		return ref{attr: attrPort}, nil
	case "connection.sni":
		return ref{attr: attrSNI}, nil
	}
	switch {
	case strings.HasPrefix(key, headersKey):
		return parseHeader(key[len(headersKey)-1:])
	case strings.HasPrefix(key, claimsKey):
		return parseClaim(key[len(claimsKey)-1:])
	case strings.HasPrefix(key, "experimental.envoy.filters."):
		return ref{}, errors.New("metadata of Envoy filters does not exist here")
	}
	return ref{}, errors.New("unknown key")
}

// parseHeader reads "[name]". Of the pseudo-headers :authority and :method are
// there; :path would hold the query, which is never judged.
func parseHeader(s string) (ref, error) {
	if len(s) < 3 || s[len(s)-1] != ']' {
		return ref{}, errors.New("malformed key: request.headers[NAME] is wanted")
	}
	switch name := asciiLower(s[1 : len(s)-1]); {
	case name == ":authority" || name == "host":
		return ref{attr: attrAuthority}, nil
	case name == ":method":
		return ref{attr: attrMethod}, nil
	case name[0] == ':':
		return ref{}, errors.New("this pseudo-header cannot be matched")
	case !isToken(name):
		return ref{}, errors.New("malformed key: not a header name")
	default:
		return ref{attr: attrHeader, name: name}, nil
	}
}

// parseClaim reads "[a][b]…".
func parseClaim(s string) (ref, error) {
	var path []string
	for s != "" {
		end := strings.IndexByte(s, ']')
		if s[0] != '[' || end < 2 || strings.ContainsAny(s[1:end], "[\x00") {
			return ref{}, errors.New("malformed key: request.auth.claims[NAME][NAME]… is wanted")
		}
		path = append(path, s[1:end])
		s = s[end+1:]
	}
	if len(path) > maxClaimDepth {
		return ref{}, errors.New("claims nest no deeper than " + strconv.Itoa(maxClaimDepth))
	}
	return ref{attr: attrClaim, claim: path}, nil
}

// isToken holds for header names (RFC 9110, 5.6.2).
func isToken(s string) bool {
	for i := range len(s) {
		c := s[i]
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && strings.IndexByte("!#$%&'*+-.^_`|~", c) < 0 {
			return false
		}
	}
	return s != ""
}

func portText(port uint16) string { return strconv.Itoa(int(port)) }
