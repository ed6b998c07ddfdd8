package attest

import "sync"

// maxAgents bounds the remembered agent tokens: one or two per node.
const maxAgents = 4096

// agentCache remembers verified tokens of agents, so that issuing a certificate
// costs one signature check of a token instead of two. Workload tokens are not
// remembered: they are used once or twice in their life.
type agentCache struct {
	mu    sync.RWMutex
	m     map[string]*claims
	limit int
}

func newAgentCache(limit int) *agentCache {
	return &agentCache{m: map[string]*claims{}, limit: limit}
}

func (c *agentCache) get(token string) *claims {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.m[token]
}

// put makes room by dropping an arbitrary entry.
func (c *agentCache) put(token string, v *claims) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.m[token]; !ok && len(c.m) >= c.limit {
		for old := range c.m {
			delete(c.m, old)
			break
		}
	}
	c.m[token] = v
}
