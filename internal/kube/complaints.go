package kube

import (
	"log/slog"
	"strings"
	"time"

	"golang.org/x/time/rate"
)

const (
	// maxComplaint bounds what is quoted of an object, which others write.
	maxComplaint = 300
	// Lines about the objects of one namespace: so many at once, and then one in
	// complaintEvery.
	complaintBurst = 20
	complaintEvery = 10 * time.Second
	// manyLimits is when limits that nobody has drawn on lately are forgotten.
	manyLimits = 1000
)

// complaints are what there is to say of objects that are left out: once until it
// changes, and of no namespace so much that it drowns the others.
type complaints struct {
	log    *slog.Logger
	now    func() time.Time
	told   map[string]string
	limits map[string]*limit // by namespace
}

type limit struct {
	*rate.Limiter
	unsaid int
}

func newComplaints(log *slog.Logger, now func() time.Time) complaints {
	return complaints{log: log, now: now, told: map[string]string{}, limits: map[string]*limit{}}
}

// complain logs what is wrong with an object, named "namespace/name" or as the
// namespace; nil forgets.
func (c *complaints) complain(kind, name string, err error) {
	key := kind + " " + name
	if err == nil {
		delete(c.told, key)
		return
	}
	text := clipTo(err.Error(), maxComplaint)
	if c.told[key] == text {
		return
	}
	l := c.limit(namespaceOf(name))
	if !l.AllowN(c.now(), 1) {
		l.unsaid++ // and not noted as told: the next change of it may say it
		return
	}
	c.told[key] = text
	c.log.Warn("object of the cluster is left out, or a part of it", slog.String("kind", kind), slog.String("object", name),
		slog.String("error", text), slog.Int("unsaid", l.unsaid))
	l.unsaid = 0
}

func (c *complaints) limit(namespace string) *limit {
	if l := c.limits[namespace]; l != nil {
		return l
	}
	if len(c.limits) >= manyLimits {
		for ns, l := range c.limits {
			if l.TokensAt(c.now()) >= complaintBurst {
				delete(c.limits, ns)
			}
		}
	}
	l := &limit{Limiter: rate.NewLimiter(rate.Every(complaintEvery), complaintBurst)}
	c.limits[namespace] = l
	return l
}

// clipTo cuts a text that somebody else has written.
func clipTo(text string, most int) string {
	if len(text) <= most {
		return text
	}
	return strings.ToValidUTF8(text[:most], "") + "…"
}
