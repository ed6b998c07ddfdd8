package kubernetes_test

import (
	"context"
	"fmt"
	"os"
	"testing"
	"time"

	"castellan.dev/certs-test/cluster"
)

// BenchmarkReadyNodes: from binaries that are built to a cluster with two Ready nodes.
func BenchmarkReadyNodes(b *testing.B) {
	if shared == nil {
		b.Skip("a cluster needs root")
	}
	ctx := context.Background()
	for range b.N {
		began := time.Now()
		c, err := cluster.Start(ctx, cluster.Config{Name: "bench", Log: os.Stderr})
		if err != nil {
			b.Fatal(err)
		}
		took := time.Since(began)
		b.ReportMetric(took.Seconds(), "s-ready")
		report(b, "a test cluster from cached binaries to two Ready nodes", "one more, beside the one that all else is measured on, which is idle", "< 30 s", "%s", fmt.Sprintf("%.1f s", took.Seconds()))
		if err := c.Stop(ctx); err != nil {
			b.Fatal(err)
		}
	}
}
