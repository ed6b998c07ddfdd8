package kubernetes_test

import (
	"testing"
	"time"
)

// Promise: 500 pods' worth of requests at once through one agent are all served in 5 s,
// and with local verification the server asks the API server for none of them. It is
// alone, so that nothing else makes the server ask.
func TestDisruptStorm(t *testing.T) {
	needCluster(t)
	const pods, promised = 500, 5 * time.Second
	took, calls := storm(t, pods)
	if most := took[len(took)-1]; most > 10*promised {
		t.Errorf("the last was served after %s", most)
	}
	if calls > pods/10 { // statuses, what tests before this one deleted
		t.Errorf("%d calls to the API server for %d certificates", calls, len(took))
	}
}
