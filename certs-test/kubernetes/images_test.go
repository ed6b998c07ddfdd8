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

// loadImages builds Castellan's own images as `make images` does, and loads them under
// the tag.
func loadImages(ctx context.Context, tag string) error {
	cmd := exec.CommandContext(ctx, "make", "--no-print-directory", "-C", "../..", "images",
		"BUILD="+path("images-"+tag), "TAG="+tag, "VERSION="+tag, "PLATFORMS="+runtime.GOARCH)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("make images: %w\n%s", err, out)
	}
	tars, err := filepath.Glob(path("images-" + tag + "/images/*.tar"))
	if err != nil || len(tars) == 0 {
		return fmt.Errorf("make images made none: %w", err)
	}
	for _, tar := range tars {
		if err := shared.LoadImage(ctx, tar); err != nil {
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
