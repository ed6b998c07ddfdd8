package install_test

import (
	"strings"
	"testing"

	clienttesting "k8s.io/client-go/testing"
)

// A permission that the next server does not need is taken when the one before,
// which may, is gone; one that it needs is there before it starts.
func TestPermissionsOutliveTheServerThatNeedsThem(t *testing.T) {
	c := newCluster(t)
	const reviews = "attestation: {verification: tokenReview}"
	for _, test := range []struct {
		name, from, to string
		before, after  bool // token reviews are permitted while the server is replaced, and in the end
	}{
		{"not needed any more", reviews, "", true, false},
		{"needed from now on", "", reviews, true, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			mustInstall(t, c, test.from)
			c.dynamic.ClearActions()
			mustInstall(t, c, test.to)
			permitted, replaced := false, false
			for _, a := range c.dynamic.Actions() {
				patch, ok := a.(clienttesting.PatchAction)
				switch {
				case !ok:
				case a.GetResource().Resource == "clusterroles":
					permitted = strings.Contains(string(patch.GetPatch()), "tokenreviews")
				case a.GetResource().Resource == "deployments":
					replaced = true
					if permitted != test.before {
						t.Errorf("while the server is replaced: %t", permitted)
					}
				}
			}
			if !replaced || permitted != test.after {
				t.Errorf("replaced %t; in the end: %t", replaced, permitted)
			}
		})
	}
}
