package kube

import (
	"context"
	"crypto/rand"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-logr/logr"
	"github.com/prometheus/client_golang/prometheus"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/leaderelection"
	"k8s.io/client-go/tools/leaderelection/resourcelock"
	"k8s.io/klog/v2"

	"castellan.dev/internal/run"
)

const (
	// leaseFor is how long after a leader that ended without a word another takes
	// over; renewWithin, after which a leader that cannot renew stops by itself, is
	// shorter, so that there are never two.
	leaseFor    = 15 * time.Second
	renewWithin = 10 * time.Second
	renewEvery  = 2 * time.Second
)

// LeaseConfig says how the leader is elected.
type LeaseConfig struct {
	// Name of the Lease.
	Name string
	// Holder names this process; empty: the host's name and something random.
	Holder     string
	Log        *slog.Logger
	Registerer prometheus.Registerer
}

// Lease lets the one server lead that writes to the cluster.
//
// RBAC: leases.coordination.k8s.io get, update; by name, in the server's namespace.
// The Lease is made by whoever installs.
type Lease struct {
	cfg  LeaseConfig
	lock resourcelock.Interface
	complaint
	leading atomic.Bool
}

// NewLease makes a candidate. Nothing is asked before Run.
func NewLease(c *Client, cfg LeaseConfig) (*Lease, error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Holder == "" {
		host, err := os.Hostname()
		if err != nil {
			return nil, fmt.Errorf("kube: name of this host: %w", err)
		}
		cfg.Holder = host + "_" + rand.Text()[:8]
	}
	l := &Lease{cfg: cfg, complaint: complaint{log: cfg.Log}, lock: &resourcelock.LeaseLock{
		LeaseMeta:  metav1.ObjectMeta{Namespace: c.Namespace(), Name: cfg.Name},
		Client:     c.bounded.CoordinationV1(),
		LockConfig: resourcelock.ResourceLockConfig{Identity: cfg.Holder},
	}}
	if cfg.Registerer != nil {
		gauge := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "castellan_server_leading",
			Help: "1 while this server is the one that writes to the cluster.",
		}, func() float64 {
			if l.Leading() {
				return 1
			}
			return 0
		})
		if err := cfg.Registerer.Register(gauge); err != nil {
			return nil, fmt.Errorf("kube: metrics: %w", err)
		}
	}
	return l, nil
}

// Leading reports whether this server leads now.
func (l *Lease) Leading() bool { return l.leading.Load() }

// Lead returns a part that runs parts while this server leads: each time from
// anew, and never beside another server's. All else of the server goes on when it
// leads no more. At the end the parts are waited for, and then the Lease is given
// back, so that the next server need not wait for it to run out.
func (l *Lease) Lead(parts ...run.Part) run.Part {
	return func(ctx context.Context) error {
		for ctx.Err() == nil {
			if err := l.term(ctx, parts); err != nil {
				return err
			}
		}
		return ctx.Err()
	}
}

// term waits for the Lease, leads, and returns when it is lost or ctx ends.
func (l *Lease) term(ctx context.Context, parts []run.Part) error {
	var (
		mu            sync.Mutex
		started, over bool
		err           error
		done          = make(chan struct{})
	)
	// finish keeps the parts from beginning, or waits for their end.
	finish := func(ctx context.Context) {
		mu.Lock()
		over = true
		waiting := started
		mu.Unlock()
		if waiting {
			select {
			case <-done:
			case <-ctx.Done():
			}
		}
	}
	// The election outlives ctx until the parts have ended.
	election, stop := context.WithCancel(klog.NewContext(context.WithoutCancel(ctx), logr.Discard()))
	defer stop()
	elector, cerr := leaderelection.NewLeaderElector(leaderelection.LeaderElectionConfig{
		Lock: tellingLock{l.lock, &l.complaint, finish}, LeaseDuration: leaseFor, RenewDeadline: renewWithin, RetryPeriod: renewEvery, ReleaseOnCancel: true, Name: l.cfg.Name,
		Callbacks: leaderelection.LeaderCallbacks{
			OnStartedLeading: func(lease context.Context) {
				mu.Lock()
				if over { // lost before it was begun
					mu.Unlock()
					return
				}
				started = true
				mu.Unlock()
				defer close(done)
				defer stop()
				err = l.lead(ctx, lease, parts)
			},
			OnStoppedLeading: func() {},
		},
	})
	if cerr != nil {
		return fmt.Errorf("kube: %w", cerr)
	}
	defer context.AfterFunc(ctx, func() {
		mu.Lock()
		defer mu.Unlock()
		if !started {
			stop()
		}
	})()
	elector.Run(election)
	finish(context.WithoutCancel(ctx))
	return err
}

// lead runs the parts until the lease or ctx ends.
func (l *Lease) lead(ctx, lease context.Context, parts []run.Part) error {
	both, cancel := context.WithCancel(lease)
	defer cancel()
	defer context.AfterFunc(ctx, cancel)()
	l.leading.Store(true)
	l.cfg.Log.Info("this server leads: it writes to the cluster", "lease", l.cfg.Name, "holder", l.cfg.Holder)
	err := run.All(both, parts...)
	l.leading.Store(false)
	if err == nil && ctx.Err() == nil {
		l.cfg.Log.Warn("this server leads no more: the Lease could not be renewed; it goes on serving", "lease", l.cfg.Name)
	}
	return err
}

// tellingLock logs why the Lease cannot be had, and gives it back only when what
// was done under it has ended.
type tellingLock struct {
	resourcelock.Interface
	*complaint
	finish func(context.Context)
}

// Get implements resourcelock.Interface.
func (t tellingLock) Get(ctx context.Context) (*resourcelock.LeaderElectionRecord, []byte, error) {
	r, raw, err := t.Interface.Get(ctx)
	return r, raw, t.tell(ctx, err)
}

// Create implements resourcelock.Interface.
func (t tellingLock) Create(ctx context.Context, r resourcelock.LeaderElectionRecord) error {
	return t.tell(ctx, t.Interface.Create(ctx, r))
}

// Update implements resourcelock.Interface.
func (t tellingLock) Update(ctx context.Context, r resourcelock.LeaderElectionRecord) error {
	if r.HolderIdentity == "" {
		t.finish(ctx)
	}
	return t.tell(ctx, t.Interface.Update(ctx, r))
}

// complaint is logged once for each reason.
type complaint struct {
	log  *slog.Logger
	mu   sync.Mutex
	last string
}

func (t *complaint) tell(ctx context.Context, err error) error {
	if ctx.Err() != nil || apierrors.IsConflict(err) {
		return err
	}
	text := ""
	if err != nil {
		text = err.Error()
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if text != "" && text != t.last {
		t.log.Warn("the Lease cannot be had or renewed", "error", err)
	}
	t.last = text
	return err
}
