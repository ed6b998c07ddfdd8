package xds

import "time"

// nextResponse takes the types in their order and returns the first response that
// may be sent now; else how long until one may, zero where nothing is held back.
func nextResponse[R any](order []string, types map[string]*subscription, now time.Time, respond func(*subscription, time.Time) *R) (*R, bool, time.Duration) {
	var wait time.Duration
	for _, url := range order {
		s := types[url]
		ok, hold := s.maySend(now)
		if !ok {
			if hold > 0 && (wait == 0 || hold < wait) {
				wait = hold
			}
			continue
		}
		if resp := respond(s, now); resp != nil {
			return resp, true, 0
		}
	}
	return nil, false, wait
}
