package kube_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"castellan.dev/ca"
	"castellan.dev/ca/blobstest"
	"castellan.dev/internal/kube"
)

// The store is what the authority takes.
var _ interface {
	ca.Blobs
	ca.Beginner
} = (*kube.Blobs)(nil)

func openBlobs(c *fakeCluster, log *slog.Logger) *kube.Blobs {
	return kube.NewBlobs(c.client(), kube.BlobsConfig{Name: "castellan-ca", Documents: ca.BlobNames(), Log: log})
}

func (c *fakeCluster) secret(t *testing.T) *corev1.Secret {
	t.Helper()
	s, err := c.Clientset.CoreV1().Secrets(namespace).Get(t.Context(), "castellan-ca", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func (c *fakeCluster) putSecret(t *testing.T, change func(*corev1.Secret)) {
	t.Helper()
	s := c.secret(t).DeepCopy()
	change(s)
	if _, err := c.Clientset.CoreV1().Secrets(namespace).Update(t.Context(), s, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
}

func (c *fakeCluster) deleteSecret(t *testing.T) {
	t.Helper()
	if err := c.Clientset.CoreV1().Secrets(namespace).Delete(t.Context(), "castellan-ca", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
}

func (c *fakeCluster) createSecret(t *testing.T, s *corev1.Secret) {
	t.Helper()
	if _, err := c.Clientset.CoreV1().Secrets(namespace).Create(t.Context(), s, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
}

func TestSecretBlobs(t *testing.T) {
	blobstest.Run(t, func(t *testing.T) blobstest.Place {
		c := newCluster(t, emptySecret())
		return blobstest.Place{
			Open: func(*testing.T) ca.Blobs { return openBlobs(c, nil) },
			Interfere: func(t *testing.T, name string, data []byte) {
				c.putSecret(t, func(s *corev1.Secret) {
					if s.Data == nil {
						s.Data = map[string][]byte{}
					}
					s.Data[name] = data
				})
			},
		}
	})
}

// TestOthersSecretIsLeftAlone: a Secret that is not the server's is refused with what
// to do, for good, and not written to.
func TestOthersSecretIsLeftAlone(t *testing.T) {
	yes := true
	for name, tt := range map[string]struct {
		secret *corev1.Secret
		want   string
	}{
		"a key of somebody else": {&corev1.Secret{Data: map[string][]byte{"password": []byte("hunter2")}}, `holds a key "password" that this server does not write: it is somebody else's`},
		"a certificate":          {&corev1.Secret{Type: corev1.SecretTypeTLS, Data: map[string][]byte{"tls.crt": {}, "tls.key": {}}}, `is of type "kubernetes.io/tls"`},
		"immutable":              {&corev1.Secret{Immutable: &yes}, "is immutable"},
		"a huge document":        {&corev1.Secret{Data: map[string][]byte{"root.pem": make([]byte, 300<<10)}}, "key root.pem has 307200 bytes"},
		"many large documents": {&corev1.Secret{Data: map[string][]byte{"root.pem": make([]byte, 250<<10), "svid-issuer.pem": make([]byte, 250<<10),
			"serving-issuer.pem": make([]byte, 250<<10), "jwt-keys.json": make([]byte, 250<<10)}}, "bytes in all"},
	} {
		t.Run(name, func(t *testing.T) {
			tt.secret.ObjectMeta = named("castellan-ca")
			c := newCluster(t, tt.secret)
			b := openBlobs(c, nil)
			_, err := b.Read(t.Context(), "root.pem")
			if err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), "castellan-system/castellan-ca") || kube.MayPass(err) {
				t.Fatal(err)
			}
			if strings.Contains(err.Error(), "hunter2") {
				t.Error("the error shows what is in it")
			}
			if err := b.Write(t.Context(), "root.pem", []byte("x")); err == nil || kube.MayPass(err) {
				t.Errorf("written: %v", err)
			}
			if c.count("update", "secrets") != 0 {
				t.Error("it was written to")
			}
		})
	}
}

// TestSecretAway: what may pass says so, and how to make a Secret that is not there.
func TestSecretAway(t *testing.T) {
	c := newCluster(t)
	b := openBlobs(c, nil)
	_, err := b.Read(t.Context(), "root.pem")
	if !kube.MayPass(err) || errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "kubectl -n castellan-system create secret generic castellan-ca") {
		t.Fatal(err)
	}
	c.createSecret(t, emptySecret())
	c.setFail(func(string, string) error { return errors.New("connection refused") })
	if _, err := b.Read(t.Context(), "root.pem"); !kube.MayPass(err) || errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	c.setFail(nil)
	if _, err := b.Read(t.Context(), "root.pem"); !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
}

func TestBlobsAreBounded(t *testing.T) {
	c := newCluster(t, emptySecret())
	b := openBlobs(c, nil)
	err := b.Write(t.Context(), "root.pem", make([]byte, 257<<10))
	if err == nil || !strings.Contains(err.Error(), "at most 262144 are kept") || c.count("update", "secrets") != 0 {
		t.Fatal(err)
	}
}

// TestLabelsMayChange: what others do to the Secret besides its documents is not
// in the way.
func TestLabelsMayChange(t *testing.T) {
	c := newCluster(t, emptySecret())
	b := openBlobs(c, nil)
	write(t, b, "root.pem", "1")
	c.putSecret(t, func(s *corev1.Secret) { s.Labels = map[string]string{"team": "a"} })
	write(t, b, "root.pem", "2")
	if s := c.secret(t); s.Labels["team"] != "a" || string(s.Data["root.pem"]) != "2" {
		t.Errorf("%v", s)
	}
}

// TestWriteWithoutAnswer: a write that was done although its answer was lost is no
// foreign one.
func TestWriteWithoutAnswer(t *testing.T) {
	c := newCluster(t, emptySecret())
	b := openBlobs(c, nil)
	write(t, b, "root.pem", "1")
	c.setFail(func(verb, _ string) error {
		if verb == "update" {
			return apierrors.NewTimeoutError("lost", 1)
		}
		return nil
	})
	if err := b.Write(t.Context(), "svid-issuer.pem", []byte("2")); !kube.MayPass(err) {
		t.Fatal(err)
	}
	c.setFail(nil)
	c.putSecret(t, func(s *corev1.Secret) { s.Data["svid-issuer.pem"] = []byte("2") }) // it arrived
	write(t, b, "svid-issuer.pem", "3")
}

func write(t *testing.T, b *kube.Blobs, name, text string) {
	t.Helper()
	if err := b.Write(t.Context(), name, []byte(text)); err != nil {
		t.Fatal(err)
	}
}

// TestDeletedSecret: the server notices, goes on, puts nothing back unasked, and
// fills the Secret that the installer makes again.
func TestDeletedSecret(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log strings.Builder
		c := newCluster(t, emptySecret())
		b := openBlobs(c, slog.New(slog.NewTextHandler(&log, nil)))
		write(t, b, "root.pem", "root key")
		write(t, b, "svid-issuer.pem", "issuer key")
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- b.Run(ctx) }()
		look := func() { time.Sleep(61 * time.Second); synctest.Wait() }
		look()
		if err := b.Err(); err != nil {
			t.Fatal(err)
		}
		c.deleteSecret(t)
		look()
		look()
		if err := b.Err(); err == nil || !strings.Contains(err.Error(), "has been deleted") {
			t.Errorf("not noticed: %v", err)
		}
		if err := b.Write(t.Context(), "jwt-keys.json", []byte("x")); !kube.MayPass(err) || !strings.Contains(err.Error(), "make the Secret again, empty, while this server runs") {
			t.Errorf("written: %v", err)
		}
		if data, err := b.Read(t.Context(), "root.pem"); err != nil || string(data) != "root key" {
			t.Errorf("%q, %v", data, err)
		}
		if n := c.count("create", "secrets"); n != 0 {
			t.Errorf("%d creations", n)
		}
		c.createSecret(t, emptySecret())
		look()
		if s := c.secret(t); string(s.Data["root.pem"]) != "root key" || string(s.Data["svid-issuer.pem"]) != "issuer key" || len(s.Data) != 2 {
			t.Errorf("it holds %d documents", len(s.Data))
		}
		if err := b.Err(); err != nil {
			t.Error(err)
		}
		write(t, b, "jwt-keys.json", "x")
		c.putSecret(t, func(s *corev1.Secret) { s.Data["root.pem"] = []byte("theirs") })
		look()
		if err := b.Err(); err == nil || !strings.Contains(err.Error(), "was changed by another server, or by hand") {
			t.Errorf("not noticed: %v", err)
		}
		c.setFail(func(string, string) error { return errors.New("connection refused") })
		look()
		if b.Err() == nil {
			t.Error("an API server that is away is no news of the Secret")
		}
		if strings.Count(log.String(), "has been deleted") != 1 || strings.Contains(log.String(), "root key") {
			t.Errorf("log: %s", log.String())
		}
		cancel()
		<-done
	})
}

// TestNewRootIsAskedOnce: the annotation counts for one write.
func TestNewRootIsAskedOnce(t *testing.T) {
	c := newCluster(t, emptySecret())
	ask := func(want bool) *kube.Blobs {
		t.Helper()
		b := openBlobs(c, nil)
		if told, err := b.MayBegin(t.Context()); err != nil || told != want {
			t.Fatal(told, err)
		}
		return b
	}
	b := ask(false)
	if hint := b.HowToBegin(); hint != "run: kubectl -n castellan-system annotate secret castellan-ca castellan.dev/new-root=true" {
		t.Error(hint)
	}
	c.putSecret(t, func(s *corev1.Secret) { s.Annotations = map[string]string{kube.BeginAnnotation: "true", "keep": "me"} })
	b = ask(true)
	write(t, b, "root.pem", "1")
	ask(false)
	if c.secret(t).Annotations["keep"] != "me" {
		t.Error("other annotations are gone")
	}
}

// TestKeysAreNotPrinted: however the store or its errors are printed.
func TestKeysAreNotPrinted(t *testing.T) {
	c := newCluster(t, emptySecret())
	b := openBlobs(c, nil)
	write(t, b, "root.pem", "PRIVATE")
	c.setFail(func(verb, _ string) error {
		return apierrors.NewForbidden(schema.GroupResource{Resource: "secrets"}, "castellan-ca", errors.New("no"))
	})
	err := b.Write(t.Context(), "root.pem", []byte("PRIVATE"))
	var log strings.Builder
	slog.New(slog.NewTextHandler(&log, nil)).Info("x", "store", b, "error", err)
	slog.New(slog.NewJSONHandler(&log, nil)).Info("x", "store", b, "error", err)
	text := fmt.Sprintf("%v %+v %#v %s", b, b, err, err) + log.String()
	if strings.Contains(text, "PRIVATE") || strings.Contains(text, "UFJJVkFURQ") {
		t.Error(text)
	}
}
