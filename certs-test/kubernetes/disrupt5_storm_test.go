package kubernetes_test

import (
	"testing"
	"time"
)

// Promise: many pods' worth of requests at once through one agent are all served, and
// with local verification the server asks the API server for none of them. It is alone,
// so that nothing else makes the server ask.
func TestDisruptStorm(t *testing.T) {
	needCluster(t)
	took, calls := storm(t, 200)
	if most := took[len(took)-1]; most > 50*time.Second {
		t.Errorf("the last was served after %s", most)
	}
	if calls > 20 { // statuses, what tests before this one deleted
		t.Errorf("%d calls to the API server for %d certificates", calls, len(took))
	}
}
