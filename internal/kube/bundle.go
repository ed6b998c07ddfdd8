package kube

import (
	"context"
	"log/slog"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"castellan.dev/internal/run"
)

// bundleKey is where in the ConfigMap the roots are.
const bundleKey = "bundle.pem"

// BundleConfig says what is published where.
type BundleConfig struct {
	// Name of the ConfigMap.
	Name string
	// Roots are PEM, with a channel that is closed at their next change.
	Roots func() ([]byte, <-chan struct{})
	Log   *slog.Logger
	Now   func() time.Time
}

// KeepBundle publishes the roots in a ConfigMap and puts it right when somebody
// deletes or alters it: agents read there whom to trust as the server.
//
// RBAC: configmaps get, list, watch, update; by name, in the server's namespace.
// configmaps create there: only for one that was deleted.
func KeepBundle(c *Client, cfg BundleConfig) run.Part {
	api := c.Kubernetes().CoreV1().ConfigMaps(c.Namespace())
	now := cfg.Now
	if now == nil {
		now = time.Now
	}
	return func(ctx context.Context) error {
		k := newKeeper("roots in ConfigMap "+c.Namespace()+"/"+cfg.Name, cfg.Log, func(ctx context.Context) (time.Duration, error) {
			roots, _ := cfg.Roots()
			return 0, putBundle(ctx, api, c.Namespace(), cfg.Name, string(roots))
		})
		m := c.mirror(watched{
			kind: "the bundle's ConfigMap", name: cfg.Name, sample: &corev1.ConfigMap{},
			list: listing(api.List), open: api.Watch, change: func(_, _ metav1.Object) { k.wake() },
		}, k.log, now)
		return run.All(ctx, m.part, follow(func() <-chan struct{} { _, next := cfg.Roots(); return next }, k.wake), k.Run)
	}
}

// configMaps is what is asked of the API server.
type configMaps interface {
	Get(ctx context.Context, name string, opts metav1.GetOptions) (*corev1.ConfigMap, error)
	Create(ctx context.Context, m *corev1.ConfigMap, opts metav1.CreateOptions) (*corev1.ConfigMap, error)
	Update(ctx context.Context, m *corev1.ConfigMap, opts metav1.UpdateOptions) (*corev1.ConfigMap, error)
}

func putBundle(ctx context.Context, api configMaps, namespace, name, roots string) error {
	if roots == "" {
		return nil // trust in nobody is never published
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	m, err := api.Get(ctx, name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		_, err = api.Create(ctx, &corev1.ConfigMap{
			ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name}, Data: map[string]string{bundleKey: roots},
		}, metav1.CreateOptions{FieldManager: fieldManager})
		return err
	}
	if err != nil || m.Data[bundleKey] == roots {
		return err
	}
	m = m.DeepCopy()
	if m.Data == nil {
		m.Data = map[string]string{}
	}
	m.Data[bundleKey] = roots
	delete(m.BinaryData, bundleKey) // the two may not share a key
	_, err = api.Update(ctx, m, metav1.UpdateOptions{FieldManager: fieldManager})
	return err
}
