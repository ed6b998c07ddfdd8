package agent

import (
	"context"
	"errors"
	"os"
	"sync"
	"time"

	"castellan.dev/agent/attest"
	"castellan.dev/agent/caclient"
	"castellan.dev/agent/csi"
	"castellan.dev/agent/svid"
)

// mounts serves the pods that the kubelet publishes volumes of: each pod is a
// workload, each of its volumes a socket. It implements csi.Host.
type mounts struct {
	agent *Agent

	mu   sync.Mutex
	pods map[string]*pod // by UID
}

// pod is one pod with a volume at least.
type pod struct {
	*workloadServer
	uid, name string
	token     *caclient.Held
	expires   time.Time
	volumes   int // guarded by mounts.mu
	stop      context.CancelFunc
	following sync.WaitGroup
}

func newMounts(a *Agent) *mounts { return &mounts{agent: a, pods: map[string]*pod{}} }

// mount is one volume; it implements csi.Endpoint.
type mount struct {
	mounts   *mounts
	pod      *pod
	listener *attest.Listener
	socket   *socket
	stop     context.CancelFunc
	ended    chan struct{}
}

// Open serves a volume.
func (m *mounts) Open(v csi.Volume, dir *os.File) (csi.Endpoint, error) {
	l, err := attest.ListenMount(attest.MountConfig{
		Dir: dir, Name: v.ID, Refused: m.agent.metrics.refused, Log: m.agent.cfg.Log,
	})
	if err != nil {
		return nil, err
	}
	p, err := m.enter(v)
	if err != nil {
		_ = l.Close() // the error at hand counts
		return nil, err
	}
	s, err := m.agent.open(p.workloadServer, l)
	if err != nil {
		_ = l.Close() // the error at hand counts
		m.leave(p)
		return nil, err
	}
	ctx, stop := context.WithCancel(context.Background())
	one := &mount{mounts: m, pod: p, listener: l, socket: s, stop: stop, ended: make(chan struct{})}
	go one.run(ctx)
	return one, nil
}

// run serves until Close. A socket that ends by itself is found dead when the
// kubelet publishes its volume again, and made anew.
func (o *mount) run(ctx context.Context) {
	defer close(o.ended)
	if err := o.socket.run(ctx); err != nil {
		o.pod.log.Error("socket ended", "pod_uid", o.pod.uid, "error", err)
	}
}

// Renew takes the pod's newest token.
func (o *mount) Renew(token caclient.Credential) {
	if o.pod.token.Set(token) {
		o.mounts.agent.rotator.TokenChanged(o.pod.source)
	}
}

// Alive reports whether the socket is in its place and answered.
func (o *mount) Alive() bool {
	select {
	case <-o.ended:
		return false
	default:
		return !o.listener.Lost()
	}
}

// Close ends the volume's streams, and with the pod's last volume its identity.
func (o *mount) Close() {
	o.stop()
	<-o.ended
	o.pod.forget(o.socket)
	o.mounts.leave(o.pod)
}

var errAnotherPod = errors.New("another account is served under the pod's UID")

// enter returns the volume's pod, with its newest token.
func (m *mounts) enter(v csi.Volume) (*pod, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	p, ok := m.pods[v.PodUID]
	switch {
	case !ok:
		p = m.begin(v)
		m.pods[v.PodUID] = p
	case p.account != v.Account:
		return nil, errAnotherPod
	case v.Expires.After(p.expires):
		p.expires = v.Expires
		if p.token.Set(v.Token) {
			m.agent.rotator.TokenChanged(p.source)
		}
	}
	p.volumes++
	return p, nil
}

// begin begins to serve a pod: its certificate is asked for at once.
func (m *mounts) begin(v csi.Volume) *pod {
	token := caclient.Hold("token of pod "+v.PodUID, v.Token)
	p := &pod{
		workloadServer: m.agent.newWorkload(svid.Identity{Account: v.Account, Token: token}),
		uid:            v.PodUID, name: v.PodName, token: token, expires: v.Expires,
	}
	p.log = p.log.With("pod_uid", v.PodUID)
	ctx, stop := context.WithCancel(context.Background())
	p.stop = stop
	p.following.Go(func() { _ = p.follow(ctx) }) // it never fails
	p.following.Go(func() { m.agent.metrics.waitFirst(ctx, p.source, m.agent.cfg.Now) })
	return p
}

// leave ends the pod with its last volume: its key and its token.
func (m *mounts) leave(p *pod) {
	m.mu.Lock()
	p.volumes--
	last := p.volumes == 0
	if last {
		delete(m.pods, p.uid)
	}
	m.mu.Unlock()
	if !last {
		return
	}
	p.stop()
	p.following.Wait()
	p.close()
	m.agent.rotator.Remove(p.source)
	p.token.Drop()
}

// each calls visit for every pod.
func (m *mounts) each(visit func(*pod)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, p := range m.pods {
		visit(p)
	}
}

var _ csi.Host = (*mounts)(nil)
