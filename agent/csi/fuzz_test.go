package csi

import (
	"path"
	"strings"
	"testing"

	csiv1 "github.com/container-storage-interface/spec/lib/go/csi"
)

// FuzzTarget: what is taken for a path is spelt in one way only, and stays below
// the pod that it names.
func FuzzTarget(f *testing.F) {
	for _, s := range []string{
		"/k/pods/uid/volumes/kubernetes.io~csi/uds/mount", "/k/pods/../volumes/kubernetes.io~csi/uds/mount", "/k/pods/uid/volumes/kubernetes.io~csi/./mount",
		"/k/pods//uid/volumes/kubernetes.io~csi/uds/mount", "", "/", "/k/pods/", "/k/pods/a/volumes/kubernetes.io~csi/a\x00/mount",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		got, err := parseTarget("/k", s)
		if err != nil {
			return
		}
		if s != path.Clean(s) || s != path.Join("/k/pods", got.podUID, "volumes/kubernetes.io~csi", got.volume, "mount") {
			t.Errorf("%q taken for %+v", s, got)
		}
		for _, part := range []string{got.podUID, got.volume} {
			if part == "" || part[0] == '.' || strings.ContainsAny(part, "/\x00\n") {
				t.Errorf("part %q of %q", part, s)
			}
		}
	})
}

// FuzzTokens: whatever comes for tokens, no error quotes it.
func FuzzTokens(f *testing.F) {
	for _, s := range []string{`{"castellan.dev":{"token":"a.b.c","expirationTimestamp":"2030-01-01T00:00:00Z"}}`, `{`, `[]`, `{"castellan.dev":{"token":1}}`, `{"castellan.dev":null}`} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		r, err := readRequest(&csiv1.NodePublishVolumeRequest{
			VolumeId: "v", TargetPath: "/k/pods/uid/volumes/kubernetes.io~csi/uds/mount", Readonly: true,
			VolumeCapability: &csiv1.VolumeCapability{AccessType: &csiv1.VolumeCapability_Mount{Mount: &csiv1.VolumeCapability_MountVolume{}}},
			VolumeContext:    map[string]string{contextEphemeral: "true", contextUID: "uid", contextPod: "p", contextNamespace: "n", contextAccount: "a"},
			Secrets:          map[string]string{contextTokens: s},
		}, "castellan.dev")
		if err == nil {
			_, _, err = r.volume("/k", "node")
		}
		if err != nil && len(s) > 12 && strings.Contains(err.Error(), s) {
			t.Errorf("%v", err)
		}
	})
}
