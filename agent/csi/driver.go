// Package csi is the agent's side of the kubelet: a CSI node service for ephemeral
// inline volumes, and its registration. A published volume is a directory with one
// socket, on which the pod it is mounted into gets its own identity and nobody
// else's; the pod's token comes with every publication.
//
// It mounts nothing and needs no privilege for it (docs/adr/0005): the socket is
// made in the directory that the kubelet mounts into the pod. It refuses callers
// other than root, volumes that are not read-only, paths with links in them, and a
// token that is not of the pod it comes for. It assumes that root on the node, the
// kubelet with it, says the truth about pods; the server verifies the token.
package csi

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/time/rate"

	"castellan.dev/internal/run"
)

// Name is the driver's, in pods and in the CSIDriver object.
const Name = "csi.castellan.dev"

// Bounds of a node. A kubelet runs 110 pods by default and some hundreds at most; a
// pod needs one volume, or one for each container that is to hold its identity.
const (
	maxVolumes = 2000
	// maxOfPod keeps the author of one pod from taking the places of a whole node.
	maxOfPod = 16
	// After a restart the kubelet publishes everything at once, and again some
	// seconds later; else each volume about every minute.
	publishBurst     = 4 * maxVolumes
	publishPerSecond = 200
	// Lines in the log about refusals: a kubelet tries each refused volume again.
	refusalsPerSecond = 10
	refusalBurst      = 100
	lockWait          = time.Minute
)

// Config sets up a Driver.
type Config struct {
	// KubeletDir is the kubelet's root directory, by the path that the kubelet uses.
	KubeletDir string
	// StateDir keeps what is published for the next agent; it should be on a tmpfs.
	StateDir string
	// Node is the node's name, as in tokens.
	Node string
	// Audience of the tokens that the server takes.
	Audience string
	Host     Host
	// Peers are the uids that may call; nil means root alone.
	Peers []uint32
	// LockWait is how long to wait for another agent's end; 0 means a minute.
	LockWait   time.Duration
	Log        *slog.Logger
	Registerer prometheus.Registerer
}

// Driver serves the kubelet.
type Driver struct {
	cfg     Config
	metrics *metrics
	rate    *rate.Limiter
	refused *rate.Limiter // lines in the log
	store   *store        // set by Run, before anything is served

	registered atomic.Pointer[registration]
	owned      chan struct{} // closed once the state is ours alone

	mu      sync.Mutex
	volumes map[string]*entry // by volume ID
	targets map[string]string // target path to volume ID
}

// entry is one volume of the table. A nil endpoint is one that is not served yet,
// or not any more.
type entry struct {
	id, path string
	podUID   string
	turn     sync.Mutex // one call at a time
	record   record
	target   target
	endpoint Endpoint
	gone     bool // no longer in the table: look again; guarded by Driver.mu too
}

// New returns a Driver that opens nothing before Run.
func New(cfg Config) (*Driver, error) {
	switch {
	case !filepath.IsAbs(cfg.KubeletDir) || filepath.Clean(cfg.KubeletDir) != cfg.KubeletDir:
		return nil, fmt.Errorf("csi: the kubelet's directory %q must be an absolute path in its shortest form", cfg.KubeletDir)
	case !filepath.IsAbs(cfg.StateDir):
		return nil, fmt.Errorf("csi: the state directory %q must be an absolute path", cfg.StateDir)
	case cfg.Node == "" || cfg.Audience == "" || cfg.Host == nil:
		return nil, errors.New("csi: the node's name, the tokens' audience and who serves pods are needed")
	}
	if cfg.Peers == nil {
		cfg.Peers = []uint32{0}
	}
	if cfg.LockWait <= 0 {
		cfg.LockWait = lockWait
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	d := &Driver{
		cfg: cfg, rate: rate.NewLimiter(publishPerSecond, publishBurst), refused: rate.NewLimiter(refusalsPerSecond, refusalBurst),
		volumes: map[string]*entry{}, targets: map[string]string{}, owned: make(chan struct{}),
	}
	d.metrics = newMetrics(cfg.Registerer, d.count)
	return d, nil
}

// Run serves until ctx ends: first what the agent before has published, then the
// kubelet. The records stay, for the agent after it.
func (d *Driver) Run(ctx context.Context) error {
	var err error
	if d.store, err = openStore(ctx, d.cfg.StateDir, d.cfg.LockWait, d.cfg.Log); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return fmt.Errorf("csi: %w", err)
	}
	defer d.store.close()
	close(d.owned)
	defer d.closeAll()
	if err := d.restore(); err != nil {
		return fmt.Errorf("csi: %w", err)
	}
	return run.All(ctx, d.serve, d.sweep)
}

// Owned waits until no other agent serves this node, or ctx ends.
func (d *Driver) Owned(ctx context.Context) error {
	select {
	case <-d.owned:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// count returns how many volumes are served.
func (d *Driver) count() float64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return float64(len(d.volumes))
}

// restore serves again what was published before. A volume whose directory is gone
// is forgotten.
func (d *Driver) restore() error {
	records, err := d.store.load(d.cfg.Log)
	if err != nil {
		return err
	}
	served := 0
	for _, r := range records {
		if err := d.restoreOne(r); err != nil {
			d.cfg.Log.Info("volume is not served again", "volume", r.Volume, "pod", r.Namespace+"/"+r.PodName, "reason", err)
			if err := d.store.drop(r.Volume); err != nil {
				d.cfg.Log.Warn("record of a volume stays", "volume", r.Volume, "error", err)
			}
			continue
		}
		served++
	}
	if served > 0 {
		d.cfg.Log.Info("volumes of the agent before are served again", "volumes", served)
	}
	return nil
}

func (d *Driver) restoreOne(r record) error {
	v, t, err := r.volume(d.cfg.KubeletDir, d.cfg.Node)
	if err != nil {
		return err
	}
	e, err := d.enter(v.ID, v.Target, t.podUID)
	if err != nil {
		return err
	}
	defer d.leave(e)
	dir, err := t.open(d.cfg.KubeletDir, false)
	if err != nil {
		return err
	}
	defer dir.Close()
	endpoint, err := d.cfg.Host.Open(v, dir)
	if err != nil {
		return err
	}
	e.record, e.target, e.endpoint = r, t, endpoint
	return nil
}

// sweepEvery is how often volumes are looked for whose directory somebody removed
// without the kubelet's saying so.
const sweepEvery = time.Minute

func (d *Driver) sweep(ctx context.Context) error {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			d.sweepOnce()
		}
	}
}

func (d *Driver) sweepOnce() {
	d.mu.Lock()
	all := make(map[string]*entry, len(d.volumes))
	for id, e := range d.volumes {
		all[id] = e
	}
	d.mu.Unlock()
	for id, e := range all {
		e.turn.Lock()
		if e.endpoint != nil {
			dir, err := e.target.open(d.cfg.KubeletDir, false)
			switch {
			case err == nil:
				dir.Close()
			case errors.Is(err, fs.ErrNotExist): // and nothing else: a fault of ours must not end what is served
				d.cfg.Log.Info("volume's directory is gone", "volume", id, "pod", e.record.Namespace+"/"+e.record.PodName)
				d.end(e)
			}
		}
		d.leave(e)
	}
}

// closeAll ends every volume, to be served by the agent after this one.
func (d *Driver) closeAll() {
	d.mu.Lock()
	defer d.mu.Unlock()
	var ending sync.WaitGroup
	for _, e := range d.volumes {
		if e.endpoint != nil {
			ending.Go(e.endpoint.Close)
		}
	}
	ending.Wait()
}
