package csi

import (
	"context"
	"errors"
	"runtime/debug"

	csiv1 "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/types/known/wrapperspb"
	registerv1 "k8s.io/kubelet/pkg/apis/pluginregistration/v1"
)

// identityService is the CSI Identity service.
type identityService struct {
	csiv1.UnimplementedIdentityServer
}

// GetPluginInfo names the driver.
func (identityService) GetPluginInfo(context.Context, *csiv1.GetPluginInfoRequest) (*csiv1.GetPluginInfoResponse, error) {
	version := "devel"
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		version = info.Main.Version
	}
	return &csiv1.GetPluginInfoResponse{Name: Name, VendorVersion: version}, nil
}

// GetPluginCapabilities returns none: there is no controller.
func (identityService) GetPluginCapabilities(context.Context, *csiv1.GetPluginCapabilitiesRequest) (*csiv1.GetPluginCapabilitiesResponse, error) {
	return &csiv1.GetPluginCapabilitiesResponse{}, nil
}

// Probe says that it answers; whether certificates can be had is the agent's readiness.
func (identityService) Probe(context.Context, *csiv1.ProbeRequest) (*csiv1.ProbeResponse, error) {
	return &csiv1.ProbeResponse{Ready: wrapperspb.Bool(true)}, nil
}

// registration is what the kubelet said last.
type registration struct{ problem error }

// registrationService is what the kubelet asks on the socket that it finds in its
// directory of plugins.
type registrationService struct {
	registerv1.UnimplementedRegistrationServer
	driver *Driver
}

// GetInfo says what the driver is and where it serves.
func (r *registrationService) GetInfo(context.Context, *registerv1.InfoRequest) (*registerv1.PluginInfo, error) {
	return &registerv1.PluginInfo{
		Type: registerv1.CSIPlugin, Name: Name, Endpoint: r.driver.socketPath(), SupportedVersions: []string{"1.0.0"},
	}, nil
}

// NotifyRegistrationStatus takes what has become of it. A kubelet that refused tries
// again by itself.
func (r *registrationService) NotifyRegistrationStatus(ctx context.Context, st *registerv1.RegistrationStatus) (*registerv1.RegistrationStatusResponse, error) {
	if st.GetPluginRegistered() {
		r.driver.registered.Store(&registration{})
		r.driver.cfg.Log.InfoContext(ctx, "registered with the kubelet", "driver", Name)
	} else {
		r.driver.registered.Store(&registration{problem: errors.New("the kubelet refused the driver")})
		r.driver.cfg.Log.ErrorContext(ctx, "the kubelet refused the driver", "driver", Name, "error", cut(st.GetError()))
	}
	return &registerv1.RegistrationStatusResponse{}, nil
}

// Registered says what is missing until the kubelet sends volumes here.
func (d *Driver) Registered() error {
	now := d.registered.Load()
	if now == nil {
		return errors.New("the kubelet has not registered the driver yet")
	}
	return now.problem
}
