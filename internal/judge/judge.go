// Package judge takes the whole decision on one request: its path, its end-user
// token, then policy. The proxy and the command that explains its decisions call
// the same code, so that they cannot differ.
//
// It fails closed: a path that cannot be normalised is 400, a token that does not
// verify 401 or 403, and without an allowing policy decision 403. It does no I/O
// and assumes that the peer of the connection was verified before.
package judge

import (
	"net/netip"
	"strings"

	"castellan.dev/authz"
	"castellan.dev/internal/jws"
)

// Kinds of refusal, constant, for metrics and logs.
const (
	KindPath   = "path"
	KindToken  = "token"
	KindPolicy = "policy"
)

// Request is what a request brings.
type Request struct {
	Method string
	// Host is the authority as received.
	Host string
	// Path is as received, without query.
	Path     string
	RawQuery string
	// Header is asked by lower-case name.
	Header authz.Header
	// RemoteIP is the original client's address as trusted proxies told it.
	RemoteIP netip.Addr
}

// Case is one request under judgement, with what came of it. Reuse it for one
// request after the other: its slices keep their room. It must not be copied
// while in use.
type Case struct {
	// Status is 200, 400, 401 or 403.
	Status int
	// Kind is one of the kinds of refusal, empty at 200.
	Kind string
	// Reason is why, for logs only; Err is more of it, where there is more.
	Reason string
	Err    error
	// Path is the path as judged, which is the one to forward.
	Path string
	// Decision is policy's, where it was asked.
	Decision authz.Decision
	// Verified is the token that counted, nil where none did.
	Verified *jws.Verified
	// Remove and Set are what request authentication does to the headers, Query
	// what it leaves of the query where SetQuery is true. Set comes after Remove.
	Remove   []string
	Set      []jws.HeaderValue
	Query    string
	SetQuery bool

	request Request
	asked   authz.Request
}

// Reset forgets the request, and keeps the room.
func (c *Case) Reset() {
	clear(c.Remove)
	clear(c.Set)
	*c = Case{Remove: c.Remove[:0], Set: c.Set[:0]}
}

// Judge decides. normalization is one of policy's Normalize constants; tokens may
// be nil, which is no rule at all; a nil connection denies.
func (c *Case) Judge(r Request, normalization string, tokens *jws.Authenticator, connection *authz.Connection) {
	c.request = r
	path, err := normalize(normalization, r.Path)
	if err != nil {
		c.Err = err
		c.refuse(400, KindPath, "path cannot be normalised")
		return
	}
	c.Path = path
	c.asked = authz.Request{Method: r.Method, Host: r.Host, Path: path, Header: r.Header, RemoteIP: r.RemoteIP}
	if tokens != nil && !c.authenticate(tokens) {
		return
	}
	c.Decision = connection.Authorize(&c.asked)
	if !c.Decision.Allowed {
		c.refuse(403, KindPolicy, c.Decision.Reason)
		return
	}
	c.Status, c.Reason = 200, c.Decision.Reason
}

func (c *Case) refuse(status int, kind, reason string) {
	c.Status, c.Kind, c.Reason = status, kind, reason
}

// normalize brings the path into the form that is judged and forwarded (authz
// 24). "*", which only OPTIONS has, is no path.
func normalize(option, path string) (string, error) {
	if path == "*" {
		return path, nil
	}
	return authz.NormalizePath(option, path)
}

// authenticate verifies end-user tokens and works out what of them is forwarded.
func (c *Case) authenticate(tokens *jws.Authenticator) bool {
	res := tokens.Authenticate((*view)(c))
	if res.Code != 0 {
		c.refuse(res.Code, KindToken, res.Reason)
		return false
	}
	c.Remove = append(append(c.Remove, res.RemoveHeaders...), res.StripHeaders...)
	c.Set = append(c.Set, res.SetHeaders...)
	if len(res.StripParams) > 0 {
		c.Query, c.SetQuery = jws.StripQuery(c.request.RawQuery, res.StripParams), true
	}
	if len(res.StripCookies) > 0 {
		c.stripCookies(res.StripCookies)
	}
	if res.Verified != nil {
		c.Verified = res.Verified
		c.asked.Claims, _ = res.Verified.Memo(claimsOf).(*authz.Claims)
	}
	if len(c.Remove)+len(c.Set) > 0 {
		// Policy judges the headers that the application will see: one that only
		// a verified token may set never counts as the caller wrote it.
		c.asked.Header = (*forwarded)(c)
	}
	return true
}

// claimsOf is computed once per token and kept with it.
func claimsOf(v *jws.Verified) any {
	return authz.NewClaims(v.Token.Claims, v.Token.Issuer, v.SpaceDelimited)
}

// stripCookies replaces the Cookie fields by what is left without the named ones.
func (c *Case) stripCookies(names []string) {
	kept := make([]string, 0, 1)
	for _, value := range c.request.Header.Values("cookie") {
		if rest := jws.StripCookie(value, names); rest != "" {
			kept = append(kept, rest)
		}
	}
	c.Remove = append(c.Remove, "cookie")
	if len(kept) > 0 {
		c.Set = append(c.Set, jws.HeaderValue{Name: "cookie", Value: strings.Join(kept, "; ")})
	}
}

// view is what request authentication reads.
type view Case

func (v *view) Values(name string) []string { return v.request.Header.Values(name) }
func (v *view) RawQuery() string            { return v.request.RawQuery }
func (v *view) Method() string              { return v.request.Method }

// forwarded is what policy reads of headers that request authentication changes.
type forwarded Case

func (f *forwarded) Values(name string) []string {
	var values []string
	set := false
	for _, h := range f.Set {
		if h.Name == name {
			values, set = append(values, h.Value), true
		}
	}
	if set {
		return values
	}
	for _, n := range f.Remove {
		if n == name {
			return nil
		}
	}
	return f.request.Header.Values(name)
}
