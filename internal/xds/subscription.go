package xds

import (
	"crypto/rand"
	"encoding/hex"
	"log/slog"
	"slices"
	"strconv"
	"time"
	"unicode/utf8"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	wildcard = "*"
	// maxReason bounds the peer's text that is kept and logged.
	maxReason = 1024
	maxNodeID = 256
	// maxUnanswered bounds the responses of one type whose answer may still come.
	maxUnanswered = 8
)

// engine is what both variants share: the stream's types, nonces and bounds.
type engine struct {
	cfg     Config
	watcher *watcher
	types   map[string]*subscription
	order   []string
	nonces  nonces
	greeted bool
}

func newEngine(cfg Config, w *watcher) engine {
	return engine{cfg: cfg, watcher: w, types: map[string]*subscription{}, nonces: newNonces()}
}

// subscription is one type on one stream.
type subscription struct {
	url      string
	snapshot Snapshot
	names    map[string]struct{}
	wildcard bool
	// dirty means that something may have to be said.
	dirty bool
	// sent is what the peer was last told: name → version, "" for "is gone".
	sent map[string]string
	// unanswered responses, oldest first.
	unanswered []response
	// holdUntil is when the next response may go out although the last is unanswered.
	holdUntil time.Time

	delta deltaState
	sotw  sotwState
}

type response struct {
	nonce    string
	versions map[string]string
}

// greet notes who the peer says it is, from the first request that says so.
func (e *engine) greet(node *corev3.Node) {
	if e.greeted || node.GetId() == "" {
		return
	}
	e.greeted = true
	if o, ok := e.cfg.Observer.(NodeObserver); ok {
		o.Node(clip(node.GetId(), maxNodeID))
	}
}

// subscribe returns the state of a type, first told whether the stream may have
// it: nil means that the request is to be ignored.
func (e *engine) subscribe(url string) (s *subscription, first bool, err error) {
	url, err = e.typeURL(url)
	if err != nil || url == "" {
		return nil, false, err
	}
	if s := e.types[url]; s != nil {
		return s, false, nil
	}
	s = &subscription{url: url, names: map[string]struct{}{}, sent: map[string]string{}}
	e.types[url] = s
	e.order = append(e.order, url)
	e.load(s)
	return s, true, nil
}

// typeURL checks the asked type against those served; "" means ignore.
func (e *engine) typeURL(url string) (string, error) {
	if len(e.cfg.Types) == 1 {
		if url == "" || url == e.cfg.Types[0] {
			return e.cfg.Types[0], nil
		}
		return "", status.Error(codes.InvalidArgument, "resource type not served here")
	}
	if slices.Contains(e.cfg.Types, url) {
		return url, nil
	}
	e.cfg.Log.Debug("request for a resource type that is not served", slog.String("type_url", clip(url, maxNodeID)))
	return "", nil
}

// load takes the source's present state and asks to be told of the next.
func (e *engine) load(s *subscription) {
	snapshot, changed := e.cfg.Source.Resources(s.url)
	s.snapshot, s.dirty = snapshot, true
	if changed != nil {
		e.watcher.watch(s.url, changed)
	}
}

func (e *engine) refresh(url string) {
	if s := e.types[url]; s != nil {
		e.load(s)
	}
}

// checkNames bounds what a stream subscribes to, over all its types; added are
// names that s gets besides those it has.
func (e *engine) checkNames(s *subscription, added []string) error {
	total := 0
	for _, other := range e.types {
		total += len(other.names)
	}
	for _, name := range added {
		if len(name) > e.cfg.Limits.NameBytes {
			return status.Errorf(codes.InvalidArgument, "a resource name is longer than %d bytes", e.cfg.Limits.NameBytes)
		}
		if _, ok := s.names[name]; !ok {
			total++
		}
	}
	if total > e.cfg.Limits.Names {
		return status.Errorf(codes.InvalidArgument, "more than %d resource names on one stream", e.cfg.Limits.Names)
	}
	return nil
}

// maySend says whether s may be sent something now, and if not, how long until then.
func (s *subscription) maySend(now time.Time) (bool, time.Duration) {
	if !s.dirty || s.snapshot == nil {
		return false, 0
	}
	if len(s.unanswered) > 0 && now.Before(s.holdUntil) {
		return false, s.holdUntil.Sub(now)
	}
	return true, 0
}

// expect notes a response that is going out.
func (e *engine) expect(s *subscription, now time.Time, versions map[string]string) string {
	nonce := e.nonces.next()
	s.unanswered = append(s.unanswered, response{nonce: nonce, versions: versions})
	if len(s.unanswered) > maxUnanswered {
		s.unanswered = slices.Delete(s.unanswered, 0, 1)
	}
	s.holdUntil = now.Add(e.cfg.Limits.AckWait)
	return nonce
}

// answer takes an ACK or, with detail, a NACK of one response.
func (e *engine) answer(s *subscription, r response, detail *statuspb.Status) {
	if detail == nil {
		e.cfg.Observer.Acked(s.url, r.versions)
		return
	}
	// The refused versions stay noted as sent: they are not sent again until they change.
	reason := clip(detail.GetMessage(), maxReason)
	if reason == "" {
		reason = "refused without a reason"
	}
	e.cfg.Log.Warn("peer refused resources", slog.String("type_url", s.url),
		slog.Any("versions", clipVersions(r.versions)), slog.String("reason", reason))
	e.cfg.Observer.Nacked(s.url, r.versions, reason)
}

// clipVersions keeps a log line readable.
func clipVersions(versions map[string]string) map[string]string {
	const most = 10
	if len(versions) <= most {
		return versions
	}
	out := make(map[string]string, most)
	for name, version := range versions {
		if len(out) == most {
			break
		}
		out[name] = version
	}
	return out
}

// clip cuts s to at most n bytes of valid UTF-8.
func clip(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n]
}

// nonces are unique in a stream, and random enough across streams that one of an
// earlier stream is not taken for one of this.
type nonces struct {
	prefix string
	count  uint64
}

func newNonces() nonces {
	b := make([]byte, 4)
	rand.Read(b) // never fails (crypto/rand)
	return nonces{prefix: hex.EncodeToString(b) + "-"}
}

func (n *nonces) next() string {
	n.count++
	return n.prefix + strconv.FormatUint(n.count, 10)
}
