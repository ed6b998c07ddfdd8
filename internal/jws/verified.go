package jws

import (
	"encoding/json"
	"strconv"
	"strings"
	"sync"
)

// Verified is a verified end-user token with what follows from it. It is shared
// by every request that presents the token.
type Verified struct {
	Token *Token
	// SpaceDelimited are the claims that the verifying rule splits on spaces (authz 18).
	SpaceDelimited []string

	rule    int
	keys    *KeySet
	headers []HeaderValue

	once sync.Once
	memo any
}

// Memo returns what build made of v the first time it was called: a place to
// keep what is derived from a token, such as *authz.Claims.
func (v *Verified) Memo(build func(*Verified) any) any {
	v.once.Do(func() { v.memo = build(v) })
	return v.memo
}

// set returns the headers a rule makes of a token (authz 30).
func (r *jwtRule) set(t *Token) []HeaderValue {
	var headers []HeaderValue
	if r.payloadHeader != "" {
		headers = append(headers, HeaderValue{r.payloadHeader, t.EncodedPayload})
	}
	for _, c := range r.claimHeaders {
		if value, ok := claimText(t.Claims, c.path); ok {
			headers = append(headers, HeaderValue{c.name, value})
		}
	}
	return headers
}

// claimText finds a claim by its path: strings, integers and booleans only. A
// string that could end a header line is left out.
func claimText(claims map[string]any, path []string) (string, bool) {
	var v any = claims
	for _, name := range path {
		m, ok := v.(map[string]any)
		if !ok {
			return "", false
		}
		if v, ok = m[name]; !ok {
			return "", false
		}
	}
	switch v := v.(type) {
	case string:
		return v, !strings.ContainsFunc(v, func(r rune) bool { return r < ' ' || r == 0x7f })
	case bool:
		return strconv.FormatBool(v), true
	case json.Number:
		return v.String(), !strings.ContainsAny(v.String(), ".eE")
	}
	return "", false
}

// cacheShards spreads the cache's locks.
const cacheShards = 16

// cache remembers verified tokens by their bytes. It is bounded; when a part is
// full an arbitrary entry goes.
type cache struct {
	shards [cacheShards]cacheShard
	limit  int // per shard
}

type cacheShard struct {
	mu sync.RWMutex
	m  map[string]*Verified
}

func newCache(size int) *cache {
	c := &cache{limit: max(1, size/cacheShards)}
	for i := range c.shards {
		c.shards[i].m = map[string]*Verified{}
	}
	return c
}

// shard goes by the token's end: bytes of the signature, as good as random.
func (c *cache) shard(token string) *cacheShard {
	n := len(token)
	if n < 2 {
		return &c.shards[0]
	}
	return &c.shards[(uint(token[n-1])*7+uint(token[n-2]))%cacheShards]
}

func (c *cache) get(token string) *Verified {
	s := c.shard(token)
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.m[token]
}

func (c *cache) put(token string, v *Verified) {
	s := c.shard(token)
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.m[token]; !ok && len(s.m) >= c.limit {
		for old := range s.m {
			delete(s.m, old)
			break
		}
	}
	s.m[token] = v
}
