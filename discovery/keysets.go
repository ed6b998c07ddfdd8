package discovery

import (
	"cmp"
	"context"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	castellanv1 "castellan.dev/api/castellan/v1"
	"castellan.dev/api/policy"
	"castellan.dev/internal/jws"
	"castellan.dev/internal/xds"
)

const (
	// maxKeySources bounds the key sets that policies may have fetched.
	maxKeySources = 1000
	// maxSourcesOfNamespace keeps one namespace's owner from naming them all.
	maxSourcesOfNamespace = 250
)

// keySets fetches the key sets that policies in force name. It belongs to one
// goroutine, but for changed.
type keySets struct {
	mesh policy.Mesh
	log  *slog.Logger
	now  func() time.Time
	// changed gets a token when some set may have changed.
	changed chan struct{}
	sources map[string]*keySource
	// told is what was last said of sources that are refused.
	told    map[string]string
	running sync.WaitGroup
}

type keySource struct {
	remote  *jws.Remote // nil: may not be fetched at all
	err     error
	timeout time.Duration
	refetch func()
	stop    context.CancelFunc
}

func newKeySets(mesh policy.Mesh, log *slog.Logger, now func() time.Time) *keySets {
	return &keySets{mesh: mesh, log: log, now: now, changed: make(chan struct{}, 1), sources: map[string]*keySource{}}
}

// follow makes the sources those that the documents name.
func (k *keySets) follow(ctx context.Context, docs []*inForce) {
	wanted, refused := wantedSources(docs, rootNamespace(k.mesh))
	for name, s := range k.sources {
		if _, ok := wanted[name]; !ok {
			s.stop()
			delete(k.sources, name)
		}
	}
	for name, timeout := range wanted {
		if s := k.sources[name]; s != nil {
			k.retime(s, timeout)
		} else {
			k.sources[name] = k.start(ctx, name, timeout)
		}
	}
	// One line each, not one for every source: their number is the attacker's choice.
	for namespace, name := range refused {
		if k.told[namespace] != name {
			// Not published: proxies have no keys for it and refuse its tokens.
			k.log.Error("too many key sources, tokens of some are refused", slog.String("namespace", namespace), slog.String("source", name),
				slog.Int("limit", maxKeySources), slog.Int("limit_of_namespace", maxSourcesOfNamespace))
		}
	}
	k.told = refused
}

// retime gives a source its timeout of now. Its keys stay: who names a source too
// must not be able to have them dropped. Where there are none, a longer timeout is
// tried at once; a source lets itself be asked that every ten seconds.
func (k *keySets) retime(s *keySource, timeout time.Duration) {
	longer := timeout > s.timeout
	if timeout == s.timeout || s.remote == nil {
		return
	}
	s.timeout = timeout
	s.remote.SetTimeout(timeout)
	if longer && s.remote.Err() != nil {
		s.refetch()
	}
}

// wantedSources are those that the documents name: of each namespace up to its
// share and, where that is too much in all, of each in turn, so that none crowds
// out another; the mesh's own come first. refused has for each namespace the first
// of those that are left out.
func wantedSources(docs []*inForce, root string) (wanted map[string]time.Duration, refused map[string]string) {
	wanted, refused = map[string]time.Duration{}, map[string]string{}
	of, timeouts := namedSources(docs, refused)
	namespaces := slices.Sorted(maps.Keys(of))
	if i := slices.Index(namespaces, root); i > 0 {
		namespaces = slices.Insert(slices.Delete(namespaces, i, i+1), 0, root)
	}
	for turn := range maxSourcesOfNamespace {
		for _, ns := range namespaces {
			if turn >= len(of[ns]) {
				continue
			}
			source := of[ns][turn]
			if _, ok := wanted[source]; ok || len(wanted) < maxKeySources {
				wanted[source] = timeouts[source]
			} else if refused[ns] == "" {
				refused[ns] = source
			}
		}
	}
	return wanted, refused
}

// namedSources are those of each namespace, in the order of its documents, and the
// timeouts. A source is shared by all who name it, so its timeout is the longest
// of theirs, and never below the default: else one of them could make every fetch
// of the others fail.
func namedSources(docs []*inForce, refused map[string]string) (of map[string][]string, timeouts map[string]time.Duration) {
	of, timeouts = map[string][]string{}, map[string]time.Duration{}
	own := map[[2]string]bool{}
	for _, d := range docs {
		if d.doc.RequestAuthentication == nil {
			continue
		}
		ns := d.ref.Namespace
		for _, rule := range d.doc.RequestAuthentication.JWTRules {
			source := jws.SourceName(rule)
			if source == "" {
				continue
			}
			if at := [2]string{ns, source}; !own[at] {
				if len(of[ns]) >= maxSourcesOfNamespace {
					refused[ns] = cmp.Or(refused[ns], source)
					continue
				}
				own[at] = true
				of[ns] = append(of[ns], source)
			}
			timeout, _ := time.ParseDuration(rule.Timeout) // admitted, or empty: the default
			timeouts[source] = max(timeouts[source], timeout, jws.DefaultTimeout)
		}
	}
	return of, timeouts
}

func (k *keySets) start(ctx context.Context, name string, timeout time.Duration) *keySource {
	remote, err := jws.NewRemote(jws.RemoteConfig{Source: name, Allow: k.mesh.JWKS.Allow, Timeout: timeout, Log: k.log, Now: k.now})
	if err != nil {
		k.log.Error("key source cannot be fetched, its tokens are refused", slog.String("source", name), slog.Any("error", err))
		return &keySource{err: err, stop: func() {}}
	}
	ctx, stop := context.WithCancel(ctx)
	k.running.Go(func() { _ = remote.Run(ctx) }) // ends with ctx only, and says why it fails by itself
	k.running.Go(func() {
		for {
			changed := remote.Changed()
			k.announce()
			select {
			case <-changed:
			case <-ctx.Done():
				return
			}
		}
	})
	refetch := func() { k.running.Go(func() { _ = remote.Refetch(ctx) }) } // whoever wants the keys asks for Err
	return &keySource{remote: remote, timeout: timeout, refetch: refetch, stop: stop}
}

func (k *keySets) announce() {
	select {
	case k.changed <- struct{}{}:
	default:
	}
}

// stop ends every fetch and waits for that.
func (k *keySets) stop() {
	for _, s := range k.sources {
		s.stop()
	}
	k.running.Wait()
}

// snapshot is the key sets as they are now. One that could not be had is
// published empty, which refuses its tokens.
func (k *keySets) snapshot() (xds.Snapshot, error) {
	out := make(xds.Snapshot, len(k.sources))
	for name, s := range k.sources {
		msg := &castellanv1.Jwks{Source: name}
		err := s.err
		if s.remote != nil {
			var keys *jws.KeySet
			if keys, err = s.remote.Keys(); keys != nil {
				msg.Jwks, err = keys.JWKS(), nil
			}
		}
		if err != nil {
			msg.Error = err.Error()
		}
		r, err := xds.NewResource(name, msg)
		if err != nil {
			return nil, err
		}
		out[name] = r
	}
	return out, nil
}
