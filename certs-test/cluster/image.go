package cluster

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"runtime"
	"slices"
	"strings"
)

// Image is a container image of one layer.
type Image struct {
	// Name is the full reference, "docker.io/local/NAME:TAG".
	Name string
	// Files are paths in the image with the files that they are copied from. All
	// become executable.
	Files      map[string]string
	Entrypoint []string
}

// WriteImage writes an image as a tarball that containerd imports.
func WriteImage(w io.Writer, image Image) error {
	layer, err := packLayer(image.Files)
	if err != nil {
		return fmt.Errorf("image %s: %w", image.Name, err)
	}
	config, err := json.Marshal(map[string]any{
		"architecture": runtime.GOARCH,
		"os":           "linux",
		"config":       map[string]any{"Entrypoint": image.Entrypoint},
		"rootfs":       map[string]any{"type": "layers", "diff_ids": []string{fmt.Sprintf("sha256:%x", sha256.Sum256(layer))}},
	})
	if err != nil {
		return err
	}
	manifest, err := json.Marshal([]map[string]any{{
		"Config": "config.json", "RepoTags": []string{image.Name}, "Layers": []string{"layer.tar"},
	}})
	if err != nil {
		return err
	}
	out := tar.NewWriter(w)
	for _, f := range []struct {
		name string
		data []byte
	}{{"config.json", config}, {"layer.tar", layer}, {"manifest.json", manifest}} {
		if err := writeFile(out, f.name, 0o644, f.data); err != nil {
			return err
		}
	}
	return out.Close()
}

func packLayer(files map[string]string) ([]byte, error) {
	var layer bytes.Buffer
	out := tar.NewWriter(&layer)
	made := map[string]bool{".": true}
	for _, target := range slices.Sorted(maps.Keys(files)) {
		name := strings.TrimPrefix(path.Clean(target), "/")
		if err := makeFolders(out, path.Dir(name), made); err != nil {
			return nil, err
		}
		data, err := os.ReadFile(files[target])
		if err != nil {
			return nil, err
		}
		if err := writeFile(out, name, 0o755, data); err != nil {
			return nil, err
		}
	}
	return layer.Bytes(), out.Close()
}

func makeFolders(out *tar.Writer, dir string, made map[string]bool) error {
	if made[dir] {
		return nil
	}
	if err := makeFolders(out, path.Dir(dir), made); err != nil {
		return err
	}
	made[dir] = true
	return out.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir + "/", Mode: 0o755})
}

func writeFile(out *tar.Writer, name string, mode int64, data []byte) error {
	if err := out.WriteHeader(&tar.Header{Name: name, Mode: mode, Size: int64(len(data))}); err != nil {
		return err
	}
	_, err := out.Write(data)
	return err
}
