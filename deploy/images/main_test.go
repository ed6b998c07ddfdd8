package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
)

// program builds a small program for a platform.
func program(t *testing.T, path, arch string, flags ...string) {
	t.Helper()
	source := filepath.Join(t.TempDir(), "main.go")
	if err := os.WriteFile(source, []byte("package main\n\nfunc main() { println(\"here\") }\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("go", append(append([]string{"build", "-trimpath", "-o", path}, flags...), source)...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+arch)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}

// binaries is a folder as make images leaves it.
func binaries(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for _, arch := range []string{"amd64", "arm64"} {
		first := ""
		for _, r := range releases {
			path := filepath.Join(dir, "linux-"+arch, r.name)
			if first == "" {
				program(t, path, arch)
				first = path
				continue
			}
			data, err := os.ReadFile(first)
			if err == nil {
				err = os.WriteFile(path, data, 0o700)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	return dir
}

// sums reads a folder as path -> digest.
func sums(t *testing.T, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := os.ReadFile(path)
		out[strings.TrimPrefix(path, dir)] = fmt.Sprintf("%x", sha256.Sum256(data))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// The same programs, in another folder and of another time, give the same bytes.
func TestReproducible(t *testing.T) {
	bin := binaries(t)
	out := t.TempDir()
	if err := run([]string{"-release", "-bin", bin, "-o", out}, io.Discard); err != nil {
		t.Fatal(err)
	}
	first := sums(t, out)
	// The tarball; the layout's two files and its blobs: index, and per platform
	// manifest, config and layer.
	if want := len(releases) * (1 + 2 + 1 + 2*3); len(first) != want {
		t.Fatalf("%d files, want %d", len(first), want)
	}

	moved := filepath.Join(t.TempDir(), "elsewhere")
	if err := os.CopyFS(moved, os.DirFS(bin)); err != nil {
		t.Fatal(err)
	}
	err := filepath.WalkDir(moved, func(path string, _ os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Chtimes(path, time.Time{}, time.Unix(1e9, 0))
	})
	if err != nil {
		t.Fatal(err)
	}
	again := t.TempDir()
	for range 2 { // the second replaces the first
		if err := run([]string{"-release", "-bin", moved, "-o", again}, io.Discard); err != nil {
			t.Fatal(err)
		}
	}
	if second := sums(t, again); !maps.Equal(first, second) {
		t.Errorf("%v\ndiffers from\n%v", second, first)
	}
}

// entries reads a tarball.
func entries(t *testing.T, r io.Reader) (content map[string][]byte, headers map[string]*tar.Header) {
	t.Helper()
	content, headers = map[string][]byte{}, map[string]*tar.Header{}
	in := tar.NewReader(r)
	for {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			return content, headers
		}
		if err != nil {
			t.Fatal(err)
		}
		if content[h.Name], err = io.ReadAll(in); err != nil {
			t.Fatal(err)
		}
		headers[h.Name] = h
	}
}

type imageConfig struct {
	Architecture, OS string
	Config           struct {
		User       string
		Entrypoint []string
	}
	RootFS struct {
		DiffIDs []string `json:"diff_ids"`
	} `json:"rootfs"`
}

func sum(data []byte) string { return fmt.Sprintf("sha256:%x", sha256.Sum256(data)) }

// layerHolds checks what is in the layer, and that nothing of this machine is.
func layerHolds(t *testing.T, layer []byte, want ...string) {
	t.Helper()
	_, headers := entries(t, bytes.NewReader(layer))
	if got := slices.Sorted(maps.Keys(headers)); !slices.Equal(got, want) {
		t.Errorf("layer holds %q, want %q", got, want)
	}
	for name, h := range headers {
		if h.Uid != 0 || h.Gid != 0 || h.Uname != "" || !h.ModTime.Equal(time.Unix(0, 0)) || h.Mode&0o022 != 0 {
			t.Errorf("%s: %+v", name, h)
		}
	}
}

func TestArchive(t *testing.T) {
	out := t.TempDir()
	if err := run([]string{"-release", "-bin", binaries(t), "-tag", "v1", "-o", out}, io.Discard); err != nil {
		t.Fatal(err)
	}
	users := map[string]string{"castellan-server": "65532:65532", "castellan-agent": "0:0", "castellan-proxy": "1337:1337", "castellan": "65532:65532"}
	for name, user := range users {
		t.Run(name, func(t *testing.T) {
			f, err := os.Open(filepath.Join(out, name+".tar"))
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			content, _ := entries(t, f)
			var manifest []struct {
				Config           string
				RepoTags, Layers []string
			}
			if err := json.Unmarshal(content["manifest.json"], &manifest); err != nil || len(manifest) != 1 || len(manifest[0].Layers) != 1 {
				t.Fatalf("%v: %s", err, content["manifest.json"])
			}
			if tags := manifest[0].RepoTags; !slices.Equal(tags, []string{"docker.io/castellan/" + name + ":v1"}) {
				t.Errorf("tags %q", tags)
			}
			layer := content[manifest[0].Layers[0]]
			checkConfig(t, content[manifest[0].Config], runtime.GOARCH, name, user, layer)
			layerHolds(t, layer, "etc/", "etc/group", "etc/passwd", "usr/", "usr/bin/", "usr/bin/"+name)
		})
	}
}

func checkConfig(t *testing.T, data []byte, arch, name, user string, layer []byte) {
	t.Helper()
	var config imageConfig
	if err := json.Unmarshal(data, &config); err != nil {
		t.Fatalf("%v: %s", err, data)
	}
	if config.OS != "linux" || config.Architecture != arch || config.Config.User != user ||
		!slices.Equal(config.Config.Entrypoint, []string{"/usr/bin/" + name}) || !slices.Equal(config.RootFS.DiffIDs, []string{sum(layer)}) {
		t.Errorf("%s", data)
	}
}

type ociDescriptor struct {
	MediaType, Digest string
	Size              int
	Platform          struct{ Architecture, OS string }
	Annotations       map[string]string
}

// blob reads what a descriptor stands for, and holds it to it.
func blob(t *testing.T, dir string, d ociDescriptor) []byte {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(dir, "blobs", strings.ReplaceAll(d.Digest, ":", "/")))
	if err != nil {
		t.Fatal(err)
	}
	if len(data) != d.Size || sum(data) != d.Digest {
		t.Errorf("%+v is %d bytes, %s", d, len(data), sum(data))
	}
	return data
}

func TestLayout(t *testing.T) {
	out := t.TempDir()
	if err := run([]string{"-release", "-bin", binaries(t), "-o", out}, io.Discard); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(out, "oci", "castellan-proxy")
	var top, all struct{ Manifests []ociDescriptor }
	read := func(data []byte, into any) {
		t.Helper()
		if err := json.Unmarshal(data, into); err != nil {
			t.Fatalf("%v: %s", err, data)
		}
	}
	entry, err := os.ReadFile(filepath.Join(dir, "index.json"))
	if err != nil {
		t.Fatal(err)
	}
	read(entry, &top)
	if len(top.Manifests) != 1 || top.Manifests[0].Annotations["org.opencontainers.image.ref.name"] != "docker.io/castellan/castellan-proxy:dev" {
		t.Fatalf("%s", entry)
	}
	read(blob(t, dir, top.Manifests[0]), &all)
	if len(all.Manifests) != 2 {
		t.Fatalf("%+v", all)
	}
	for i, arch := range []string{"amd64", "arm64"} {
		if p := all.Manifests[i].Platform; p.Architecture != arch || p.OS != "linux" {
			t.Errorf("platform %d is %+v", i, p)
		}
		var m struct {
			Config ociDescriptor
			Layers []ociDescriptor
		}
		read(blob(t, dir, all.Manifests[i]), &m)
		z, err := gzip.NewReader(bytes.NewReader(blob(t, dir, m.Layers[0])))
		if err != nil {
			t.Fatal(err)
		}
		layer, err := io.ReadAll(z)
		if err != nil {
			t.Fatal(err)
		}
		checkConfig(t, blob(t, dir, m.Config), arch, "castellan-proxy", "1337:1337", layer)
	}
}

func TestAnyProgram(t *testing.T) {
	dir := t.TempDir()
	static, other, dynamic := filepath.Join(dir, "static"), filepath.Join(dir, "other"), filepath.Join(dir, "dynamic")
	otherArch := map[string]string{"amd64": "arm64", "arm64": "amd64"}[runtime.GOARCH]
	program(t, static, runtime.GOARCH)
	program(t, other, otherArch)
	program(t, dynamic, runtime.GOARCH, "-buildmode=pie") // names a loader
	out := filepath.Join(dir, "echo.tar")

	tests := map[string]struct {
		args []string
		want string
	}{
		"static":        {[]string{"-name", "docker.io/local/echo:dev", "-binary", static, "-o", out}, ""},
		"other machine": {[]string{"-name", "docker.io/local/echo:dev", "-binary", other, "-o", out}, "is a program for"},
		"its own":       {[]string{"-name", "docker.io/local/echo:dev", "-binary", other, "-arch", otherArch, "-o", out}, ""},
		"dynamic":       {[]string{"-name", "docker.io/local/echo:dev", "-binary", dynamic, "-o", out}, "is not static"},
		"no program":    {[]string{"-name", "docker.io/local/echo:dev", "-binary", "main.go", "-o", out}, "bad magic number"},
		"no tag":        {[]string{"-name", "docker.io/local/echo", "-binary", static, "-o", out}, "want REGISTRY/REPOSITORY:TAG"},
		"no output":     {[]string{"-name", "docker.io/local/echo:dev", "-binary", static}, "usage"},
		"both":          {[]string{"-release", "-name", "docker.io/local/echo:dev", "-binary", static, "-o", out}, "usage"},
		"no platform":   {[]string{"-name", "docker.io/local/echo:dev", "-binary", static, "-arch", "s390x", "-o", out}, `platform "s390x"`},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			err := run(tt.args, io.Discard)
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("%v, want %q", err, tt.want)
			}
		})
	}

	// With its loader beside it, a dynamic program is one that can start.
	loader := map[string]string{"amd64": "/lib64/ld-linux-x86-64.so.2", "arm64": "/lib/ld-linux-aarch64.so.1"}[runtime.GOARCH]
	if err := run([]string{"-name", "docker.io/local/echo:dev", "-binary", dynamic, "-file", static + "=" + loader, "-o", out}, io.Discard); err != nil {
		t.Error(err)
	}
	// What was refused left nothing behind.
	left, err := filepath.Glob(filepath.Join(dir, ".image-*"))
	if err != nil || len(left) > 0 {
		t.Errorf("%v %v", left, err)
	}
}
