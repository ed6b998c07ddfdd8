package discovery

import (
	"context"
	"log/slog"
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
	remote *jws.Remote // nil: may not be fetched at all
	err    error
	stop   context.CancelFunc
}

func newKeySets(mesh policy.Mesh, log *slog.Logger, now func() time.Time) *keySets {
	return &keySets{mesh: mesh, log: log, now: now, changed: make(chan struct{}, 1), sources: map[string]*keySource{}}
}

// follow makes the sources those that the documents name.
func (k *keySets) follow(ctx context.Context, docs []*inForce) {
	wanted, refused := wantedSources(docs)
	for name, s := range k.sources {
		if _, ok := wanted[name]; !ok {
			s.stop()
			delete(k.sources, name)
		}
	}
	for name, timeout := range wanted {
		if k.sources[name] != nil {
			continue
		}
		if len(k.sources) >= maxKeySources {
			// Not published: proxies have no keys for it and refuse its tokens.
			refused[""] = name
			continue
		}
		k.sources[name] = k.start(ctx, name, timeout)
	}
	// One line each, not one for every source: their number is the attacker's choice.
	for namespace, name := range refused {
		if k.told[namespace] != name {
			k.log.Error("too many key sources, tokens of some are refused", slog.String("namespace", namespace), slog.String("source", name),
				slog.Int("limit", maxKeySources), slog.Int("limit_of_namespace", maxSourcesOfNamespace))
		}
	}
	k.told = refused
}

// wantedSources are those that the documents name, by namespace up to its share;
// refused has one of those beyond it.
func wantedSources(docs []*inForce) (wanted map[string]time.Duration, refused map[string]string) {
	wanted, refused = map[string]time.Duration{}, map[string]string{}
	of := map[string]map[string]bool{}
	for _, d := range docs {
		if d.doc.RequestAuthentication == nil {
			continue
		}
		own := of[d.ref.Namespace]
		if own == nil {
			own = map[string]bool{}
			of[d.ref.Namespace] = own
		}
		for _, rule := range d.doc.RequestAuthentication.JWTRules {
			source := jws.SourceName(rule)
			if source == "" {
				continue
			}
			if !own[source] && len(own) >= maxSourcesOfNamespace {
				refused[d.ref.Namespace] = source
				continue
			}
			own[source] = true
			timeout, _ := time.ParseDuration(rule.Timeout) // admitted, or empty: the default
			wanted[source] = max(wanted[source], timeout)
		}
	}
	return wanted, refused
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
	return &keySource{remote: remote, stop: stop}
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
