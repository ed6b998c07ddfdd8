package kube_test

import (
	"errors"
	"log/slog"
	"strings"
	"sync"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"castellan.dev/internal/kube"
)

// value is something that changes, with a channel that is closed then.
type value[T any] struct {
	mu      sync.Mutex
	v       T
	changed chan struct{}
}

func newValue[T any](v T) *value[T] { return &value[T]{v: v, changed: make(chan struct{})} }

func (v *value[T]) get() (T, <-chan struct{}) {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.v, v.changed
}

func (v *value[T]) set(next T) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.v = next
	close(v.changed)
	v.changed = make(chan struct{})
}

// syncedLog is a log that others may read.
type syncedLog struct {
	mu  sync.Mutex
	buf strings.Builder
}

func (l *syncedLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *syncedLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

func (l *syncedLog) logger() *slog.Logger { return slog.New(slog.NewTextHandler(l, nil)) }

// TestBundleIsKept: the roots are published, follow the authority, and are put right
// when somebody alters or deletes them; what else is in the ConfigMap stays.
func TestBundleIsKept(t *testing.T) {
	c := newCluster(t, &corev1.ConfigMap{ObjectMeta: named("castellan-bundle")})
	api := c.Clientset.CoreV1().ConfigMaps(namespace)
	var log syncedLog
	roots := newValue([]byte("roots 1"))
	stop := startPart(t, kube.KeepBundle(c.client(), kube.BundleConfig{Name: "castellan-bundle", Roots: roots.get, Log: log.logger()}))
	published := func(want string) {
		t.Helper()
		within30s(t, "published: "+want, func() bool {
			m, err := api.Get(t.Context(), "castellan-bundle", metav1.GetOptions{})
			return err == nil && m.Data["bundle.pem"] == want
		})
	}
	edit := func(f func(*corev1.ConfigMap)) {
		t.Helper()
		m, err := api.Get(t.Context(), "castellan-bundle", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		m = m.DeepCopy()
		f(m)
		if _, err := api.Update(t.Context(), m, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	published("roots 1")
	roots.set([]byte("roots 2"))
	published("roots 2")
	edit(func(m *corev1.ConfigMap) {
		m.Data["bundle.pem"], m.Data["other"], m.Labels = "theirs", "kept", map[string]string{"a": "b"}
	})
	published("roots 2")
	if m, _ := api.Get(t.Context(), "castellan-bundle", metav1.GetOptions{}); m.Data["other"] != "kept" || m.Labels["a"] != "b" {
		t.Error("something else of it is gone", m)
	}
	edit(func(m *corev1.ConfigMap) { m.Data = nil })
	published("roots 2")
	if err := api.Delete(t.Context(), "castellan-bundle", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	published("roots 2")
	roots.set(nil) // never published
	edit(func(m *corev1.ConfigMap) { m.Labels = nil })
	published("roots 2")
	c.setFail(func(verb, _ string) error {
		if verb == "get" {
			return errors.New("connection refused")
		}
		return nil
	})
	roots.set([]byte("roots 3"))
	within30s(t, "failure told", func() bool { return strings.Contains(log.String(), "connection refused") })
	c.setFail(nil)
	published("roots 3")
	within30s(t, "recovery told", func() bool { return strings.Contains(log.String(), "kept in the cluster again") })
	if err := stop(); err != nil {
		t.Error(err)
	}
}
