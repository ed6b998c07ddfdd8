package install

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
)

// Config is what an Installer works with.
type Config struct {
	Dynamic    dynamic.Interface
	Kubernetes kubernetes.Interface
	// Namespace that all lives in; empty: DefaultNamespace.
	Namespace string
	// Progress gets a line for each step; nil: nobody.
	Progress func(line string)
	// Poll is how often what is waited for is asked after; default half a second.
	Poll time.Duration
	// Now is the clock that certificates are judged by; nil: the real one.
	Now func() time.Time
}

// Installer works on one cluster.
type Installer struct{ cfg Config }

// New makes an Installer. It contacts nobody.
func New(cfg Config) (*Installer, error) {
	if cfg.Dynamic == nil || cfg.Kubernetes == nil {
		return nil, errors.New("install: no clients")
	}
	if cfg.Namespace == "" {
		cfg.Namespace = DefaultNamespace
	}
	if cfg.Progress == nil {
		cfg.Progress = func(string) {}
	}
	if cfg.Poll <= 0 {
		cfg.Poll = 500 * time.Millisecond
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Installer{cfg: cfg}, nil
}

func (in *Installer) progress(format string, args ...any) {
	in.cfg.Progress(fmt.Sprintf(format, args...))
}

// KubeVersion asks the API server for its version.
func (in *Installer) KubeVersion() (string, error) {
	v, err := in.cfg.Kubernetes.Discovery().ServerVersion()
	if err != nil {
		return "", fmt.Errorf("the API server's version: %w", err)
	}
	return v.GitVersion, nil
}

// Install makes the cluster be as rendered: for the first time, or in place of
// whatever version is there. With wait it goes on to the next stage only when the
// one before is ready. It may be repeated after any failure.
func (in *Installer) Install(ctx context.Context, r *Rendered, wait bool) error {
	old, err := in.readInventory(ctx)
	if err != nil {
		return err
	}
	if old == nil {
		old = &Inventory{}
		in.progress("installing Castellan %s into namespace %s", r.AppVersion, in.cfg.Namespace)
	} else {
		in.progress("changing Castellan %s in namespace %s to %s", old.AppVersion, in.cfg.Namespace, r.AppVersion)
	}
	if err := in.applyNamespace(ctx); err != nil {
		return err
	}
	var now []ref
	for _, o := range r.Objects {
		now = append(now, refOf(o))
	}
	// Written first: what a run that is interrupted has made is known to the next.
	inv := Inventory{Version: r.Version, AppVersion: r.AppVersion, Values: r.Values, Objects: slices.Concat(now, without(old.Objects, now))}
	if err := in.writeInventory(ctx, inv); err != nil {
		return err
	}
	if err := in.installCRDs(ctx, r.CRDs); err != nil {
		return err
	}
	// Webhooks that will not be answered any more go before what answers them.
	if err := in.prune(ctx, ofStage(old.Objects, stageWebhooks), now); err != nil {
		return err
	}
	for _, s := range []stage{stageGround, stageServer, stageAgent, stageWebhooks} {
		if err := in.installStage(ctx, s, r.Objects, wait); err != nil {
			return err
		}
	}
	if err := in.narrow(ctx, r.Objects); err != nil {
		return err
	}
	if err := in.prune(ctx, old.Objects, now); err != nil {
		return err
	}
	if err := in.forgetTaints(ctx, r); err != nil {
		return err
	}
	inv.Objects = now
	return in.writeInventory(ctx, inv)
}

// forgetTaints takes our taint from the nodes where the server is no longer to keep
// it, nor allowed to.
func (in *Installer) forgetTaints(ctx context.Context, r *Rendered) error {
	cfg, err := serverConfig(r)
	if err != nil || cfg.Kubernetes == nil || cfg.Kubernetes.KeepNodesTainted {
		return err
	}
	return in.untaint(ctx)
}

func ofStage(list []ref, s stage) []ref {
	return slices.DeleteFunc(slices.Clone(list), func(r ref) bool { return kinds[r.Kind].stage != s })
}

func without(list, those []ref) []ref {
	return slices.DeleteFunc(slices.Clone(list), func(r ref) bool { return slices.Contains(those, r) })
}

func (in *Installer) installCRDs(ctx context.Context, crds []*unstructured.Unstructured) error {
	for _, crd := range crds {
		if err := in.applyCRD(ctx, crd); err != nil {
			return err
		}
	}
	for _, crd := range crds {
		if err := in.established(ctx, crd); err != nil {
			return err
		}
	}
	return nil
}

func (in *Installer) installStage(ctx context.Context, s stage, objects []*unstructured.Unstructured, wait bool) error {
	var applied []ref
	for _, o := range objects {
		if kinds[o.GetKind()].stage != s {
			continue
		}
		if isRole(o) {
			var err error
			if o, err = in.widened(ctx, o); err != nil {
				return err
			}
		}
		if err := in.apply(ctx, o); err != nil {
			return err
		}
		applied = append(applied, refOf(o))
	}
	if !wait {
		return nil
	}
	for _, r := range applied {
		switch s {
		case stageServer, stageAgent:
			if err := in.ready(ctx, r); err != nil {
				return err
			}
			in.progress("%s is ready", r.Name)
		case stageWebhooks:
			if err := in.trusted(ctx, r); err != nil {
				return err
			}
			in.progress("%s is in force", r.Name)
		}
	}
	return nil
}
