package csi

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"

	csiv1 "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"castellan.dev/agent/attest"
)

// node is the CSI Node service. What it does not have, the kubelet does not ask for.
type node struct {
	csiv1.UnimplementedNodeServer
	*Driver
}

// NodeGetCapabilities returns none: no staging, no statistics, no groups.
func (n *node) NodeGetCapabilities(context.Context, *csiv1.NodeGetCapabilitiesRequest) (*csiv1.NodeGetCapabilitiesResponse, error) {
	return &csiv1.NodeGetCapabilitiesResponse{}, nil
}

// NodeGetInfo returns the node's name.
func (n *node) NodeGetInfo(context.Context, *csiv1.NodeGetInfoRequest) (*csiv1.NodeGetInfoResponse, error) {
	return &csiv1.NodeGetInfoResponse{NodeId: n.cfg.Node}, nil
}

// NodePublishVolume serves a pod, or takes the new token of one that is served. It
// waits for no server: the certificate comes to whoever asks on the socket.
func (n *node) NodePublishVolume(ctx context.Context, req *csiv1.NodePublishVolumeRequest) (*csiv1.NodePublishVolumeResponse, error) {
	r, err := readRequest(req, n.cfg.Audience)
	if err != nil {
		return nil, n.refuse(ctx, codes.InvalidArgument, req, err)
	}
	v, t, err := r.volume(n.cfg.KubeletDir, n.cfg.Node)
	switch {
	case errors.Is(err, errNotOurs):
		return nil, n.refuse(ctx, codes.PermissionDenied, req, err)
	case err != nil:
		return nil, n.refuse(ctx, codes.InvalidArgument, req, err)
	}
	e, err := n.enter(v.ID, v.Target, t.podUID)
	switch {
	case errors.Is(err, errFull), errors.Is(err, errPodFull):
		return nil, n.refuse(ctx, codes.ResourceExhausted, req, err)
	case err != nil:
		return nil, n.refuse(ctx, codes.FailedPrecondition, req, err)
	}
	defer n.leave(e)
	// Not before: what is refused for good is tried again all the same, and must not
	// use up what there is for others.
	if !n.rate.Allow() {
		return nil, status.Error(codes.ResourceExhausted, "too many volumes at once, try again")
	}
	if e.endpoint != nil && e.endpoint.Alive() {
		n.renew(e, r, v)
		return &csiv1.NodePublishVolumeResponse{}, nil
	}
	if e.endpoint != nil { // somebody took the socket away
		n.end(e)
	}
	if err := n.open(e, r, v, t); err != nil {
		n.cfg.Log.ErrorContext(ctx, "volume cannot be served", "volume", v.ID, "pod", r.Namespace+"/"+r.PodName, "error", err)
		return nil, status.Error(codes.Internal, "the volume cannot be served; the agent's log says why")
	}
	n.cfg.Log.InfoContext(ctx, "volume published", "volume", v.ID, "pod", r.Namespace+"/"+r.PodName, "pod_uid", v.PodUID, "account", v.Account.String())
	return &csiv1.NodePublishVolumeResponse{}, nil
}

// renew gives an open volume's pod its newest token.
func (d *Driver) renew(e *entry, r record, v Volume) {
	if e.record.Token == r.Token {
		return
	}
	e.record = r
	d.keep(r)
	e.endpoint.Renew(v.Token)
}

// open serves a volume. When it cannot be, nothing of it stays behind.
func (d *Driver) open(e *entry, r record, v Volume, t target) error {
	dir, err := t.open(d.cfg.KubeletDir, true)
	if err != nil {
		return err
	}
	defer dir.Close()
	endpoint, err := d.cfg.Host.Open(v, dir)
	if err != nil {
		_ = t.remove(d.cfg.KubeletDir) // the error at hand counts
		return err
	}
	e.record, e.target, e.endpoint = r, t, endpoint
	d.keep(r)
	return nil
}

// keep records a volume. One that cannot be recorded is served all the same: only
// an agent after this one would have to wait for the kubelet.
func (d *Driver) keep(r record) {
	if err := d.store.save(r); err != nil {
		d.cfg.Log.Error("volume cannot be recorded; after a restart it waits for the kubelet", "volume", r.Volume, "error", err)
	}
}

// NodeUnpublishVolume ends what is served on a volume, and removes it. What is not
// served is cleared away just so: an agent may have ended in between.
func (n *node) NodeUnpublishVolume(ctx context.Context, req *csiv1.NodeUnpublishVolumeRequest) (*csiv1.NodeUnpublishVolumeResponse, error) {
	id := req.GetVolumeId()
	t, err := parseTarget(n.cfg.KubeletDir, req.GetTargetPath())
	if err != nil || !volumeIDs.MatchString(id) {
		// Nothing of ours can be there. An error would keep the pod from ever being
		// deleted, and its identity does not depend on this answer.
		n.cfg.Log.WarnContext(ctx, "the kubelet ends a volume that is none of ours", "volume", slog.StringValue(id[:min(len(id), 128)]))
		return &csiv1.NodeUnpublishVolumeResponse{}, nil
	}
	switch e, err := n.enter(id, req.GetTargetPath(), t.podUID); {
	case err == nil:
		defer n.leave(e)
		if e.endpoint != nil {
			n.end(e)
			n.cfg.Log.InfoContext(ctx, "volume unpublished", "volume", id, "pod", e.record.Namespace+"/"+e.record.PodName, "pod_uid", e.record.PodUID)
		}
	case errors.Is(err, errOccupied):
		n.cfg.Log.WarnContext(ctx, "unpublishing refused", "volume", id, "error", err)
		return nil, status.Error(codes.InvalidArgument, err.Error())
	default: // what is served, if anything is, is elsewhere
	}
	if err := n.clear(t); err != nil {
		n.cfg.Log.ErrorContext(ctx, "volume cannot be removed", "volume", id, "error", err)
		return nil, status.Error(codes.Internal, "the volume cannot be removed; the agent's log says why")
	}
	return &csiv1.NodeUnpublishVolumeResponse{}, nil
}

// clear removes a volume's directory with the socket in it. It being gone is fine.
func (d *Driver) clear(t target) error {
	dir, err := t.open(d.cfg.KubeletDir, false)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := attest.ClearMount(dir); err != nil {
		return err
	}
	if err := t.remove(d.cfg.KubeletDir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// refuse answers with the reason, which is for whoever wrote the pod: the kubelet
// shows it in the pod's events.
func (d *Driver) refuse(ctx context.Context, code codes.Code, req *csiv1.NodePublishVolumeRequest, err error) error {
	vc := req.GetVolumeContext()
	if !d.refused.Allow() {
		return status.Error(code, err.Error())
	}
	d.cfg.Log.WarnContext(ctx, "volume refused", "volume", cut(req.GetVolumeId()), "namespace", cut(vc[contextNamespace]),
		"pod", cut(vc[contextPod]), "pod_uid", cut(vc[contextUID]), "reason", err)
	return status.Error(code, err.Error())
}

// cut bounds what a request brings into the log.
func cut(s string) string { return s[:min(len(s), 253)] }
