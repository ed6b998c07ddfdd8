package csi_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	csiv1 "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"castellan.dev/agent/agenttest"
	"castellan.dev/agent/csi"
	"castellan.dev/agent/csi/csitest"
)

func TestPublish(t *testing.T) {
	for name, inContext := range map[string]bool{"tokens as secrets": false, "tokens in the volume context": true} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			n.kubelet.TokensInContext = inContext
			p := pod("1")
			n.publish(p)
			if err := n.listening(p); err != nil {
				t.Fatal(err)
			}
			e := n.host.of(p)
			if e == nil || e.volume.Account.String() != account || e.volume.PodUID != p.UID || e.volume.PodName != p.Name || e.volume.Target != n.kubelet.Target(p) || e.volume.Expires.IsZero() {
				t.Fatalf("served %+v", e)
			}
			if info, err := os.Stat(n.kubelet.Target(p)); err != nil || info.Mode().Perm() != 0o755 {
				t.Errorf("directory %v %v: every uid of the pod must pass, and nobody write", info, err)
			}
			if err := n.driver.Registered(); err != nil {
				t.Error(err)
			}
			if strings.Contains(n.logs.String(), token(p)[:40]) {
				t.Error("the log holds a token")
			}
		})
	}
}

// TestPublishRefuses: nothing is served, and nothing stays behind.
func TestPublishRefuses(t *testing.T) {
	other := agenttest.Token(account, "uid-other")
	tokens := func(audience, token string) string {
		text, err := json.Marshal(map[string]any{audience: map[string]string{"token": token, "expirationTimestamp": "2030-01-01T00:00:00Z"}})
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	const key = "csi.storage.k8s.io/serviceAccount.tokens"
	type request = csiv1.NodePublishVolumeRequest
	in := func(k, v string) func(*request) { return func(r *request) { r.VolumeContext[k] = v } }
	path := func(change func(string) string) func(*request) {
		return func(r *request) { r.TargetPath = change(r.TargetPath) }
	}
	const (
		pathText  = "target path is not one of a pod's volume"
		oneText   = "not of one and the same pod"
		tokenText = "no token of the wanted audience"
	)
	for name, test := range map[string]struct {
		change func(*request)
		code   codes.Code
		want   string
	}{
		"writable":                   {func(r *request) { r.Readonly = false }, codes.InvalidArgument, "the volume must be read-only: set readOnly: true"},
		"persistent":                 {in("csi.storage.k8s.io/ephemeral", "false"), codes.InvalidArgument, "only ephemeral"},
		"no lifecycle":               {func(r *request) { delete(r.VolumeContext, "csi.storage.k8s.io/ephemeral") }, codes.InvalidArgument, "only ephemeral"},
		"no description of the pod":  {func(r *request) { delete(r.VolumeContext, "csi.storage.k8s.io/pod.name") }, codes.InvalidArgument, "podInfoOnMount: true"},
		"an attribute":               {in("socket", "x"), codes.InvalidArgument, `volume attribute "socket" is not known`},
		"a block device":             {func(r *request) { r.VolumeCapability.AccessType = &csiv1.VolumeCapability_Block{} }, codes.InvalidArgument, "no block devices"},
		"no capability":              {func(r *request) { r.VolumeCapability = nil }, codes.InvalidArgument, "no block devices"},
		"a file system":              {func(r *request) { r.VolumeCapability.GetMount().FsType = "ext4" }, codes.InvalidArgument, "leave fsType out"},
		"mount flags":                {func(r *request) { r.VolumeCapability.GetMount().MountFlags = []string{"exec"} }, codes.InvalidArgument, "no mount flags"},
		"a staging path":             {func(r *request) { r.StagingTargetPath = "/x" }, codes.InvalidArgument, "no staging path"},
		"no token":                   {func(r *request) { r.Secrets = nil }, codes.InvalidArgument, tokenText},
		"another audience":           {func(r *request) { r.Secrets[key] = tokens("vault", other) }, codes.InvalidArgument, tokenText},
		"an empty token":             {func(r *request) { r.Secrets[key] = tokens("castellan.dev", "") }, codes.InvalidArgument, tokenText},
		"no JSON":                    {func(r *request) { r.Secrets[key] = "hello" }, codes.InvalidArgument, "cannot be read"},
		"no JWT":                     {func(r *request) { r.Secrets[key] = tokens("castellan.dev", "abc") }, codes.InvalidArgument, "token is not a JWT"},
		"a header in the token":      {func(r *request) { r.Secrets[key] = tokens("castellan.dev", "a.b.c\r\nx: y") }, codes.InvalidArgument, "characters that no token has"},
		"a token of 9 kB":            {func(r *request) { r.Secrets[key] = tokens("castellan.dev", strings.Repeat("a", 9<<10)) }, codes.InvalidArgument, "more than 8192 bytes"},
		"a token of another pod":     {func(r *request) { r.Secrets[key] = tokens("castellan.dev", other) }, codes.PermissionDenied, oneText},
		"a token of another account": {func(r *request) { r.Secrets[key] = tokens("castellan.dev", agenttest.Token("shop/billing", "uid-1")) }, codes.PermissionDenied, oneText},
		"secrets before the author's words": {func(r *request) {
			r.VolumeContext[key], r.Secrets[key] = r.Secrets[key], tokens("castellan.dev", other)
		}, codes.PermissionDenied, oneText},
		"another UID":                   {in("csi.storage.k8s.io/pod.uid", "uid-2"), codes.PermissionDenied, oneText},
		"another name":                  {in("csi.storage.k8s.io/pod.name", "orders-1"), codes.PermissionDenied, oneText},
		"another namespace":             {in("csi.storage.k8s.io/pod.namespace", "bank"), codes.PermissionDenied, oneText},
		"another account":               {in("csi.storage.k8s.io/serviceAccount.name", "billing"), codes.PermissionDenied, oneText},
		"no account's name":             {in("csi.storage.k8s.io/serviceAccount.name", "../x"), codes.InvalidArgument, "the pod's service account"},
		"no pod's name":                 {in("csi.storage.k8s.io/pod.name", "a/b"), codes.InvalidArgument, "the pod's name"},
		"no volume ID":                  {func(r *request) { r.VolumeId = "" }, codes.InvalidArgument, "volume id"},
		"a path for a volume ID":        {func(r *request) { r.VolumeId = "../../x" }, codes.InvalidArgument, "volume id"},
		"another pod's directory":       {path(func(p string) string { return strings.Replace(p, "uid-1", "uid-2", 1) }), codes.PermissionDenied, oneText},
		"no path":                       {path(func(string) string { return "" }), codes.InvalidArgument, pathText},
		"a path elsewhere":              {path(func(string) string { return "/etc/mount" }), codes.InvalidArgument, pathText},
		"a path that begins alike":      {path(func(p string) string { return strings.Replace(p, "/pods/", "/pods2/", 1) }), codes.InvalidArgument, pathText},
		"dots in the path":              {path(func(p string) string { return strings.Replace(p, "/uds/", "/../", 1) }), codes.InvalidArgument, pathText},
		"a pod of dots":                 {path(func(p string) string { return strings.Replace(p, "uid-1", "..", 1) }), codes.InvalidArgument, pathText},
		"a longer path":                 {path(func(p string) string { return p + "/mount" }), codes.InvalidArgument, pathText},
		"a slash at the end":            {path(func(p string) string { return p + "/" }), codes.InvalidArgument, pathText},
		"a doubled slash":               {path(func(p string) string { return strings.Replace(p, "/uds/", "//uds/", 1) }), codes.InvalidArgument, pathText},
		"another plugin's":              {path(func(p string) string { return strings.Replace(p, "~csi", "~secret", 1) }), codes.InvalidArgument, pathText},
		"no mount":                      {path(func(p string) string { return strings.TrimSuffix(p, "/mount") }), codes.InvalidArgument, pathText},
		"a directory that is not there": {path(func(p string) string { return strings.Replace(p, "/uds/", "/other/", 1) }), codes.Internal, "the volume cannot be served"},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			err := n.kubelet.Publish(t.Context(), pod("1"), token(pod("1")), test.change)
			st := status.Convert(err)
			if st.Code() != test.code || !strings.Contains(st.Message(), test.want) {
				t.Errorf("%v, want %v %q", err, test.code, test.want)
			}
			if open, _ := n.host.count(); open != 0 || len(n.state()) != 0 {
				t.Errorf("%d volumes served, records %v", open, n.state())
			}
			if err := gone(n.kubelet.Target(pod("1"))); err != nil {
				t.Error(err)
			}
			if strings.Contains(n.logs.String()+st.Message(), other[:40]) || strings.Contains(n.logs.String(), token(pod("1"))[:40]) {
				t.Error("a token was shown")
			}
		})
	}
}

// TestLinks: no part below the kubelet's directory may be a link, wherever it leads.
func TestLinks(t *testing.T) {
	for _, part := range []string{"pods/uid-1", "pods/uid-1/volumes", "pods/uid-1/volumes/kubernetes.io~csi", "pods/uid-1/volumes/kubernetes.io~csi/uds", "pods/uid-1/volumes/kubernetes.io~csi/uds/mount"} {
		t.Run(part, func(t *testing.T) {
			n := newNode(t)
			p := pod("1")
			if err := os.MkdirAll(n.kubelet.Target(p), 0o755); err != nil {
				t.Fatal(err)
			}
			link := filepath.Join(n.kubelet.Dir, part)
			if err := os.Rename(link, link+"-real"); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink(link+"-real", link); err != nil {
				t.Fatal(err)
			}
			err := n.kubelet.Publish(t.Context(), p, token(p))
			if status.Code(err) != codes.Internal {
				t.Errorf("publish: %v", err)
			}
			if open, _ := n.host.count(); open != 0 {
				t.Error("served all the same")
			}
			if err := n.kubelet.Call(t.Context(), func(c csiv1.NodeClient) error {
				_, err := c.NodeUnpublishVolume(t.Context(), &csiv1.NodeUnpublishVolumeRequest{VolumeId: p.VolumeID(), TargetPath: n.kubelet.Target(p)})
				return err
			}); status.Code(err) != codes.Internal {
				t.Errorf("unpublish: %v", err)
			}
			if _, err := os.Stat(n.kubelet.Target(p)); err != nil {
				t.Errorf("unpublish went through the link: %v", err)
			}
		})
	}
}

// TestRepublish: the kubelet comes again within seconds, and every minute.
func TestRepublish(t *testing.T) {
	n := newNode(t)
	p, q := pod("1"), pod("2")
	n.publish(q)
	first := token(p)
	for range 3 {
		if err := n.kubelet.Publish(t.Context(), p, first); err != nil {
			t.Fatal(err)
		}
	}
	e := n.host.of(p)
	if _, opened := n.host.count(); opened != 2 || len(e.tokens) != 0 {
		t.Errorf("%d opened, %d tokens, for the same again", opened, len(e.tokens))
	}
	before, err := os.ReadFile(n.state()[0])
	if err != nil {
		t.Fatal(err)
	}
	n.publish(p) // with a new token
	if len(e.tokens) != 1 || len(n.host.of(q).tokens) != 0 {
		t.Errorf("%d new tokens for the pod, %d for the other one", len(e.tokens), len(n.host.of(q).tokens))
	}
	after, err := os.ReadFile(n.state()[0])
	if err != nil {
		t.Fatal(err)
	}
	second, err := os.ReadFile(n.state()[1])
	if err != nil {
		t.Fatal(err)
	}
	if string(before) == string(after) && strings.Contains(string(second), first) {
		t.Error("the new token is not kept for the agent after this one")
	}
}

// TestSocketTakenAway: the next publication makes it again.
func TestSocketTakenAway(t *testing.T) {
	n := newNode(t)
	p := pod("1")
	n.publish(p)
	if err := os.Remove(filepath.Join(n.kubelet.Target(p), "socket")); err != nil {
		t.Fatal(err)
	}
	n.publish(p)
	if err := n.listening(p); err != nil {
		t.Error(err)
	}
	if open, opened := n.host.count(); open != 1 || opened != 2 {
		t.Errorf("%d open, %d opened", open, opened)
	}
}

func TestUnpublish(t *testing.T) {
	n := newNode(t)
	p := pod("1")
	n.publish(p)
	for i := range 3 { // again and again
		if err := n.kubelet.Unpublish(t.Context(), p); err != nil {
			t.Fatalf("%d: %v", i, err)
		}
	}
	if open, _ := n.host.count(); open != 0 || len(n.state()) != 0 {
		t.Errorf("%d volumes served, records %v", open, n.state())
	}
	if err := gone(n.kubelet.Target(p)); err != nil {
		t.Error(err)
	}
	n.publish(p)
	if err := n.listening(p); err != nil {
		t.Errorf("published again: %v", err)
	}
}

// TestUnpublishOfTheUnknown: an agent that knows nothing clears away what another
// left, or a pod could never be deleted.
func TestUnpublishOfTheUnknown(t *testing.T) {
	n := newNode(t)
	p := pod("1")
	n.publish(p)
	if err := n.stop(); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(n.cfg.StateDir); err != nil {
		t.Fatal(err)
	}
	target := n.kubelet.Target(p)
	leaveStaleSocket(t, target)
	n.start()
	if err := n.kubelet.Unpublish(t.Context(), p); err != nil {
		t.Error(err)
	}
	for _, req := range []*csiv1.NodeUnpublishVolumeRequest{
		{}, {VolumeId: p.VolumeID(), TargetPath: "/etc"}, {VolumeId: "../x", TargetPath: target}, {VolumeId: strings.Repeat("x", 1<<10)},
	} {
		if err := n.kubelet.Call(t.Context(), func(c csiv1.NodeClient) error {
			_, err := c.NodeUnpublishVolume(t.Context(), req)
			return err
		}); err != nil {
			t.Errorf("%v: %v", req, err)
		}
	}
}

// TestTwoPaths: a volume is at one path, and a path is one volume's.
func TestTwoPaths(t *testing.T) {
	n := newNode(t)
	p := pod("1")
	n.publish(p)
	second := p
	second.Volume = "uds2"
	n.publish(second) // two volumes of one pod are fine
	elsewhere := p
	elsewhere.Volume = "uds3"
	err := n.kubelet.Publish(t.Context(), elsewhere, token(p), func(r *csiv1.NodePublishVolumeRequest) { r.VolumeId = p.VolumeID() })
	if st := status.Convert(err); st.Code() != codes.FailedPrecondition || st.Message() != "the volume is published at another path" {
		t.Errorf("same volume, another path: %v", err)
	}
	err = n.kubelet.Publish(t.Context(), p, token(p), func(r *csiv1.NodePublishVolumeRequest) { r.VolumeId = "csi-other" })
	if st := status.Convert(err); st.Code() != codes.FailedPrecondition || st.Message() != "another volume is published at that path" {
		t.Errorf("another volume, same path: %v", err)
	}
	unpublish := func(id, path string) error {
		return n.kubelet.Call(t.Context(), func(c csiv1.NodeClient) error {
			_, err := c.NodeUnpublishVolume(t.Context(), &csiv1.NodeUnpublishVolumeRequest{VolumeId: id, TargetPath: path})
			return err
		})
	}
	if err := unpublish("csi-other", n.kubelet.Target(p)); status.Code(err) != codes.InvalidArgument {
		t.Errorf("another volume's path was cleared away: %v", err)
	}
	if err := unpublish(p.VolumeID(), n.kubelet.Target(elsewhere)); err != nil {
		t.Errorf("a path that is not served: %v", err)
	}
	for _, one := range []csitest.Pod{p, second} {
		if err := n.listening(one); err != nil {
			t.Errorf("%s: %v", one.Volume, err)
		}
	}
}

// TestHostThatCannot: the error names nothing, nothing stays, and the next call may do better.
func TestHostThatCannot(t *testing.T) {
	n := newNode(t)
	n.host.fail = errors.New("no sockets left")
	p := pod("1")
	err := n.kubelet.Publish(t.Context(), p, token(p))
	if st := status.Convert(err); st.Code() != codes.Internal || strings.Contains(st.Message(), "no sockets left") {
		t.Errorf("%v", err)
	}
	if err := gone(n.kubelet.Target(p)); err != nil {
		t.Error(err)
	}
	n.host.fail = nil
	n.publish(p)
}

// TestFullNode: the bound holds, and what is served stays.
func TestFullNode(t *testing.T) {
	n := newNode(t)
	var all sync.WaitGroup
	turn := make(chan struct{}, 8)
	for i := range csi.MaxVolumes {
		all.Go(func() {
			turn <- struct{}{}
			defer func() { <-turn }()
			p := pod(fmt.Sprint(i))
			if err := n.kubelet.Publish(t.Context(), p, token(p)); err != nil {
				t.Errorf("%d: %v", i, err)
			}
		})
	}
	all.Wait()
	err := n.kubelet.Publish(t.Context(), pod("more"), token(pod("more")))
	if st := status.Convert(err); st.Code() != codes.ResourceExhausted || st.Message() != fmt.Sprintf("this node serves %d volumes already, which is the most", csi.MaxVolumes) {
		t.Errorf("one more: %v", err)
	}
	n.publish(pod("0")) // those there are go on
	if err := n.kubelet.Unpublish(t.Context(), pod("more")); err != nil {
		t.Errorf("unpublishing on a full node: %v", err)
	}
	if err := n.kubelet.Unpublish(t.Context(), pod("0")); err != nil {
		t.Error(err)
	}
	n.publish(pod("more"))
}

// TestFullPod: one pod's author does not take the places of a node's other pods.
func TestFullPod(t *testing.T) {
	n := newNode(t)
	volume := func(i int) csitest.Pod {
		p := pod("greedy")
		p.Volume = fmt.Sprint("v", i)
		return p
	}
	for i := range csi.MaxOfPod {
		n.publish(volume(i))
	}
	more := volume(csi.MaxOfPod)
	err := n.kubelet.Publish(t.Context(), more, token(more))
	if st := status.Convert(err); st.Code() != codes.ResourceExhausted || !strings.HasPrefix(st.Message(), "the pod has 16 volumes") {
		t.Errorf("one more: %v", err)
	}
	n.publish(volume(0)) // its tokens are renewed
	n.publish(pod("other"))
	for _, p := range []csitest.Pod{more, volume(0)} {
		if err := n.kubelet.Unpublish(t.Context(), p); err != nil {
			t.Error(err)
		}
	}
	n.publish(more)
	n.restart()
	if open, _ := n.host.count(); open != csi.MaxOfPod+1 {
		t.Errorf("%d volumes are served after a restart", open)
	}
}
