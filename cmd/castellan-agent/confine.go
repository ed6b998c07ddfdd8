package main

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"castellan.dev/agent/csi"
	"castellan.dev/internal/config"
	"castellan.dev/internal/disk"
	"castellan.dev/internal/harden/confine"
)

// confineFiles takes from an agent on Kubernetes what it does not need of the
// node's files. Into the kubelet's directory of pods it can put sockets, and it can
// read nothing there: other pods' tokens lie in it, and the agent is uid 0.
func confineFiles(cfg config.Agent, log *slog.Logger) error {
	pods := filepath.Join(cfg.CSI.KubeletDir, "pods")
	plugin, registry := filepath.Join(cfg.CSI.KubeletDir, "plugins", csi.Name), filepath.Join(cfg.CSI.KubeletDir, "plugins_registry")
	operator := filepath.Dir(cfg.AdminSocket)
	if err := disk.MakeDir(cfg.CSI.StateDir); err != nil {
		return fmt.Errorf("csi.stateDir: %w", err)
	}
	// Where they are no mounts of a pod's they may not be there yet.
	for _, dir := range []string{pods, plugin, registry, operator} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return fmt.Errorf("csi: %w", err)
		}
	}
	version, err := confine.Files(
		confine.Keep(cfg.CSI.StateDir),
		confine.Listen(pods, plugin, registry, operator),
		confine.List(plugin, registry, operator),
		// Whoever keeps them fresh replaces these files, so it is their directories.
		confine.Read(filepath.Dir(cfg.TokenFile), filepath.Dir(cfg.Server.BundleFile)),
		confine.Read("/etc", "/proc/self"), // the resolver's; our own metrics
		confine.ReadFiles("/etc/resolv.conf", "/etc/hosts", "/proc/stat", "/proc/sys/net/core/somaxconn", "/dev/null"),
	)
	switch {
	case err != nil:
		return err
	case version == 0:
		log.Warn("this kernel has no Landlock; the agent's uid alone decides what it can read on the node")
	default:
		log.Info("files confined", "landlock", version)
	}
	return nil
}
