package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"
)

// benchPolicy: a policy file changed → enforced, and reported as enforced.
func benchPolicy(ctx context.Context, opt options) error {
	m, err := startMesh(ctx, opt, nil)
	if err != nil {
		return err
	}
	defer m.stop()
	path := filepath.Join(m.PolicyDir, "90-bench.yaml")
	deny := []byte(`apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: bench, namespace: shop}
spec:
  action: DENY
  rules: [{to: [{operation: {paths: ["/bench"]}}]}]
`)
	url := m.Workloads["shop/frontend"].Outbound["orders"] + "/bench"
	var enforced, reported []float64
	for range opt.repeat {
		began := time.Now()
		if err := os.WriteFile(path, deny, 0o644); err != nil {
			return err
		}
		if err := waitListen(ctx, func() error {
			if getOK(url) == nil {
				return errors.New("still allowed")
			}
			return nil
		}); err != nil {
			return err
		}
		enforced = append(enforced, time.Since(began).Seconds()*1000)
		if err := waitListen(ctx, func() error {
			out, _ := exec.CommandContext(ctx, filepath.Join(opt.bin, "castellan"), "check", "--up", filepath.Join(m.dir, "up.json")).Output()
			if !bytes.Contains(out, []byte("shop/bench: in force on 3 of 3")) {
				return fmt.Errorf("not reported: %s", out)
			}
			return nil
		}); err != nil {
			return err
		}
		reported = append(reported, time.Since(began).Seconds()*1000)
		if err := os.Remove(path); err != nil {
			return err
		}
		if err := waitListen(ctx, func() error { return getOK(url) }); err != nil {
			return err
		}
	}
	opt.reach("policy file changed → enforced, worst", slices.Max(enforced), 1000, " ms")
	opt.reach("policy file changed → reported as enforced, worst", slices.Max(reported), 1000, " ms")
	return nil
}
