package kubernetes_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
)

// build builds commands of the product.
func build(ctx context.Context, dir string, names ...string) error {
	args := []string{"build", "-trimpath", "-tags", "grpcnotrace", "-ldflags", "-s -w", "-o", dir + "/"}
	for _, name := range names {
		args = append(args, "./cmd/"+name)
	}
	return goCommand(ctx, "../..", args...)
}

func goCommand(ctx context.Context, dir string, args ...string) error {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOTOOLCHAIN=local")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go %v: %w\n%s", args, err, out)
	}
	return nil
}

// packer is deploy/images, built once.
var packer = sync.OnceValues(func() (string, error) {
	return path("images"), goCommand(context.Background(), "../..", "build", "-o", path("images"), "./deploy/images")
})

// pack packs an image with deploy/images and loads it into every node.
func pack(ctx context.Context, tar string, args ...string) error {
	images, err := packer()
	if err != nil {
		return err
	}
	out, err := exec.CommandContext(ctx, images, append(args, "-o", tar)...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("images %v: %w\n%s", args, err, out)
	}
	return nil
}

// loadImages builds Castellan's own images and loads them under the tag.
func loadImages(ctx context.Context, tag string) error {
	dir := filepath.Join(bin, "linux-"+runtime.GOARCH)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := build(ctx, dir, "castellan", "castellan-server", "castellan-agent", "castellan-proxy"); err != nil {
		return err
	}
	if err := pack(ctx, path("images-"+tag), "-release", "-bin", bin, "-tag", tag, "-platforms", ""); err != nil {
		return err
	}
	for _, name := range []string{"castellan-server", "castellan-agent", "castellan-proxy"} {
		if err := shared.LoadImage(ctx, filepath.Join(path("images-"+tag), name+".tar")); err != nil {
			return err
		}
	}
	return nil
}

const appImage = "docker.io/local/app:dev"

// loadApps builds and loads the tests' own application.
func loadApps(ctx context.Context) error {
	if err := goCommand(ctx, ".", "build", "-trimpath", "-ldflags", "-s -w", "-o", path("app"), "./apps/app"); err != nil {
		return err
	}
	if err := pack(ctx, path("app.tar"), "-name", appImage, "-binary", path("app")); err != nil {
		return err
	}
	return shared.LoadImage(ctx, path("app.tar"))
}
