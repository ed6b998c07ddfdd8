package proxy

// Held is what requests in flight are counted to hold, and Budget what they may.
func (p *Proxy) Held() int64   { return p.limits.held.Load() }
func (p *Proxy) Budget() int64 { return p.limits.budget }
