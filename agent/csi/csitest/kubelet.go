// Package csitest plays a node's kubelet for tests: it registers the driver, makes
// the directories that the kubelet makes, and publishes and unpublishes volumes
// with the calls that kubelet v1.36 makes. It can publish hundreds of pods at once
// and tell how soon each had its certificate.
//
// It assumes to be the only kubelet of its directory.
package csitest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	csiv1 "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	registerv1 "k8s.io/kubelet/pkg/apis/pluginregistration/v1"

	"castellan.dev/agent/attest"
	"castellan.dev/agent/csi"
)

// Kubelet is a node's kubelet, as far as one driver sees it.
type Kubelet struct {
	// Dir is its root directory.
	Dir string
	// Audience of the tokens; default castellan.dev.
	Audience string
	// TokensInContext sends tokens in the volume context, as clusters before 1.35 do.
	TokensInContext bool

	endpoint string
}

// Pod is one pod with one volume of the driver.
type Pod struct {
	Namespace, Name, UID, ServiceAccount string
	// Volume is its name in the pod; default "uds".
	Volume string
}

func (p Pod) volume() string {
	if p.Volume == "" {
		return "uds"
	}
	return p.Volume
}

// VolumeID is the volume's ID, unique to pod and volume as the kubelet's are.
func (p Pod) VolumeID() string { return fmt.Sprintf("csi-%x", sum(p.UID+p.volume())) }

// Register waits for the driver's registration socket and registers it.
func (k *Kubelet) Register(ctx context.Context) error {
	socket := filepath.Join(k.Dir, "plugins_registry", csi.Name+"-reg.sock")
	for {
		err := k.registerOnce(ctx, socket)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("registration: %w", err)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func (k *Kubelet) registerOnce(ctx context.Context, socket string) error {
	conn, err := dial(socket)
	if err != nil {
		return err
	}
	defer conn.Close()
	client := registerv1.NewRegistrationClient(conn)
	info, err := client.GetInfo(ctx, &registerv1.InfoRequest{})
	if err != nil {
		return err
	}
	if info.GetType() != registerv1.CSIPlugin || info.GetName() != csi.Name || len(info.GetSupportedVersions()) == 0 {
		return fmt.Errorf("registration says %v", info)
	}
	k.endpoint = info.GetEndpoint()
	if err := k.Call(ctx, func(node csiv1.NodeClient) error {
		_, err := node.NodeGetInfo(ctx, &csiv1.NodeGetInfoRequest{})
		return err
	}); err != nil {
		return err
	}
	_, err = client.NotifyRegistrationStatus(ctx, &registerv1.RegistrationStatus{PluginRegistered: true})
	return err
}

// Call makes calls on a connection of their own, as the kubelet does for each.
func (k *Kubelet) Call(_ context.Context, do func(csiv1.NodeClient) error) error {
	if k.endpoint == "" {
		return errors.New("the driver is not registered")
	}
	conn, err := dial(k.endpoint)
	if err != nil {
		return err
	}
	defer conn.Close()
	return do(csiv1.NewNodeClient(conn))
}

func dial(socket string) (*grpc.ClientConn, error) {
	return grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
}

// Target is the path at which a pod's volume is published.
func (k *Kubelet) Target(p Pod) string {
	return filepath.Join(k.Dir, "pods", p.UID, "volumes", "kubernetes.io~csi", p.volume(), "mount")
}

// Request is what the kubelet sends to publish p's volume.
func (k *Kubelet) Request(p Pod, token string) *csiv1.NodePublishVolumeRequest {
	audience := k.Audience
	if audience == "" {
		audience = "castellan.dev"
	}
	tokens, _ := json.Marshal(map[string]any{audience: map[string]any{ // strings only
		"token": token, "expirationTimestamp": time.Now().Add(time.Hour).UTC().Format(time.RFC3339), //nolint:forbidigo // a test's clock
	}})
	req := &csiv1.NodePublishVolumeRequest{
		VolumeId: p.VolumeID(), TargetPath: k.Target(p), Readonly: true,
		VolumeCapability: &csiv1.VolumeCapability{
			AccessType: &csiv1.VolumeCapability_Mount{Mount: &csiv1.VolumeCapability_MountVolume{}},
			AccessMode: &csiv1.VolumeCapability_AccessMode{Mode: csiv1.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
		},
		VolumeContext: map[string]string{
			"csi.storage.k8s.io/pod.name": p.Name, "csi.storage.k8s.io/pod.namespace": p.Namespace, "csi.storage.k8s.io/pod.uid": p.UID,
			"csi.storage.k8s.io/serviceAccount.name": p.ServiceAccount, "csi.storage.k8s.io/ephemeral": "true",
		},
		Secrets: map[string]string{},
	}
	in := req.Secrets
	if k.TokensInContext {
		in = req.VolumeContext
	}
	in["csi.storage.k8s.io/serviceAccount.tokens"] = string(tokens)
	return req
}

// Publish publishes a pod's volume with its token; change may alter the request.
func (k *Kubelet) Publish(ctx context.Context, p Pod, token string, change ...func(*csiv1.NodePublishVolumeRequest)) error {
	if err := os.MkdirAll(filepath.Dir(k.Target(p)), 0o750); err != nil {
		return err
	}
	req := k.Request(p, token)
	for _, c := range change {
		c(req)
	}
	return k.Call(ctx, func(node csiv1.NodeClient) error {
		// It asks about capabilities each time.
		if _, err := node.NodeGetCapabilities(ctx, &csiv1.NodeGetCapabilitiesRequest{}); err != nil {
			return err
		}
		_, err := node.NodePublishVolume(ctx, req)
		return err
	})
}

// Unpublish ends a pod's volume and removes its directories, which must be empty
// by then as far as the driver is concerned.
func (k *Kubelet) Unpublish(ctx context.Context, p Pod) error {
	if err := k.Call(ctx, func(node csiv1.NodeClient) error {
		_, err := node.NodeUnpublishVolume(ctx, &csiv1.NodeUnpublishVolumeRequest{VolumeId: p.VolumeID(), TargetPath: k.Target(p)})
		return err
	}); err != nil {
		return err
	}
	for _, dir := range []string{k.Target(p), filepath.Dir(k.Target(p))} {
		if err := os.Remove(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}

// Dial connects to a pod's socket, whose path may be longer than an address can be.
func (k *Kubelet) Dial(ctx context.Context, p Pod) (net.Conn, error) {
	dir, err := os.Open(k.Target(p))
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	return (&net.Dialer{}).DialContext(ctx, "unix", fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), attest.SocketName))
}

// Conn returns a gRPC connection to a pod's socket; the caller closes it.
func (k *Kubelet) Conn(p Pod) (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///"+p.UID, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return k.Dial(ctx, p) }))
}
