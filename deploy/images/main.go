// Command images packs programs into container images, without a container engine.
//
//	images -release -bin build -o build/images      Castellan's own images
//	images -name REGISTRY/NAME:TAG -binary FILE -o FILE.tar      any static program
//
// It refuses what package pack refuses.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"castellan.dev/deploy/images/pack"
)

func main() {
	if err := run(os.Args[1:], os.Stderr); err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "images:", err)
		os.Exit(1)
	}
}

// releases are Castellan's images, each with the user it runs as. The agent makes
// directories below the kubelet's, which root owns; the proxy's uid is how traffic
// capture knows the proxy's own connections.
var releases = []struct{ name, user string }{
	{"castellan-server", "65532:65532"},
	{"castellan-agent", "0:0"},
	{"castellan-proxy", "1337:1337"},
	{"castellan", "65532:65532"},
	// The application of the walk-through in docs/kubernetes.md.
	{"hello", "65532:65532"},
}

// files collects -file SRC=DST.
type files map[string]string

func (f files) String() string { return fmt.Sprint(len(f)) }

func (f files) Set(v string) error {
	source, target, ok := strings.Cut(v, "=")
	if !ok || source == "" || !strings.HasPrefix(target, "/") {
		return fmt.Errorf("%q, want FILE=/PATH/IN/IMAGE", v)
	}
	f[target] = source
	return nil
}

func run(args []string, stderr io.Writer) error {
	flags := flag.NewFlagSet("images", flag.ContinueOnError)
	flags.SetOutput(stderr)
	release := flags.Bool("release", false, "pack Castellan's own images")
	bin := flags.String("bin", "build", "`FOLDER` with linux-ARCH/PROGRAM, for -release")
	registry := flags.String("registry", "docker.io/castellan", "registry and `REPOSITORY` folder, for -release")
	tag := flags.String("tag", "dev", "`TAG`, for -release")
	platforms := flags.String("platforms", "amd64 arm64", "platforms of the OCI layouts, for -release; empty for none")
	out := flags.String("o", "", "`FILE` of one image, or folder of -release's")
	image := pack.Image{Files: files{}}
	flags.StringVar(&image.Name, "name", "", "`REFERENCE` of one image")
	flags.StringVar(&image.Binary, "binary", "", "its program's `FILE`")
	flags.StringVar(&image.User, "user", "65532:65532", "`UID[:GID]` that it runs as")
	flags.StringVar(&image.Arch, "arch", runtime.GOARCH, "its platform")
	flags.Var(files(image.Files), "file", "a further `FILE=/PATH/IN/IMAGE`; may be repeated")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 || *out == "" || *release != (image.Name == "" && image.Binary == "") {
		return errors.New("usage: images -release -o FOLDER, or images -name REFERENCE -binary FILE -o FILE")
	}
	if !*release {
		return archive(*out, image)
	}
	for _, r := range releases {
		image := pack.Image{
			Name: *registry + "/" + r.name + ":" + *tag, User: r.user,
			Labels: map[string]string{"org.opencontainers.image.title": r.name, "org.opencontainers.image.licenses": "Apache-2.0"},
		}
		program := func(arch string) string { return filepath.Join(*bin, "linux-"+arch, r.name) }
		image.Arch, image.Binary = runtime.GOARCH, program(runtime.GOARCH)
		if err := archive(filepath.Join(*out, r.name+".tar"), image); err != nil {
			return err
		}
		if err := layout(filepath.Join(*out, "oci", r.name), image, program, strings.Fields(*platforms)); err != nil {
			return err
		}
	}
	return nil
}

// layout writes an image for all platforms.
func layout(dir string, image pack.Image, program func(arch string) string, platforms []string) error {
	if len(platforms) == 0 {
		return nil
	}
	var all []pack.Image
	for _, arch := range platforms {
		image.Arch, image.Binary = arch, program(arch)
		all = append(all, image)
	}
	_, err := pack.Layout(dir, all)
	return err
}

// archive replaces the file in one step: an importer never reads half of one.
func archive(path string, image pack.Image) (err error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".image-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	if err := errors.Join(pack.Archive(f, image), f.Chmod(0o644), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
