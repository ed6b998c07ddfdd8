package pack

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// Media types of the OCI image specification 1.1.
const (
	typeIndex    = "application/vnd.oci.image.index.v1+json"
	typeManifest = "application/vnd.oci.image.manifest.v1+json"
	typeConfig   = "application/vnd.oci.image.config.v1+json"
	typeLayer    = "application/vnd.oci.image.layer.v1.tar+gzip"
)

type descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int               `json:"size"`
	Platform    *platform         `json:"platform,omitempty"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

type platform struct {
	Architecture string `json:"architecture"`
	OS           string `json:"os"`
}

type manifest struct {
	SchemaVersion int          `json:"schemaVersion"`
	MediaType     string       `json:"mediaType"`
	Config        descriptor   `json:"config"`
	Layers        []descriptor `json:"layers"`
}

type index struct {
	SchemaVersion int          `json:"schemaVersion"`
	MediaType     string       `json:"mediaType"`
	Manifests     []descriptor `json:"manifests"`
}

// Layout writes the same image for several platforms as an OCI layout, in a
// folder that must not exist or be a layout of before, and returns the digest of
// the index that stands for all of them.
func Layout(dir string, images []Image) (string, error) {
	if len(images) == 0 {
		return "", errors.New("layout: no platforms")
	}
	if err := os.RemoveAll(filepath.Join(dir, "blobs")); err != nil {
		return "", err
	}
	l := layout{dir: filepath.Join(dir, "blobs", "sha256")}
	if err := os.MkdirAll(l.dir, 0o755); err != nil {
		return "", err
	}
	all := index{SchemaVersion: 2, MediaType: typeIndex}
	for _, image := range images {
		if image.Name != images[0].Name {
			return "", fmt.Errorf("layout: %q and %q in one", images[0].Name, image.Name)
		}
		m, err := l.image(image)
		if err != nil {
			return "", err
		}
		all.Manifests = append(all.Manifests, m)
	}
	top, err := l.json(typeIndex, all)
	if err != nil {
		return "", err
	}
	// containerd reads the first of the two, most others the second.
	top.Annotations = map[string]string{"io.containerd.image.name": images[0].Name, "org.opencontainers.image.ref.name": images[0].Name}
	entry, err := json.Marshal(index{SchemaVersion: 2, MediaType: typeIndex, Manifests: []descriptor{top}})
	if err != nil {
		return "", err
	}
	if err := os.WriteFile(filepath.Join(dir, "index.json"), entry, 0o644); err != nil {
		return "", err
	}
	return top.Digest, os.WriteFile(filepath.Join(dir, "oci-layout"), []byte(`{"imageLayoutVersion":"1.0.0"}`), 0o644)
}

// layout is a folder of blobs.
type layout struct{ dir string }

func (l layout) image(image Image) (descriptor, error) {
	p, err := image.pack()
	if err != nil {
		return descriptor{}, err
	}
	config, err := l.blob(typeConfig, p.config)
	if err != nil {
		return descriptor{}, err
	}
	var compressed bytes.Buffer
	z, err := gzip.NewWriterLevel(&compressed, gzip.DefaultCompression)
	if err != nil {
		return descriptor{}, err
	}
	if _, err := z.Write(p.layer); err != nil {
		return descriptor{}, err
	}
	if err := z.Close(); err != nil {
		return descriptor{}, err
	}
	layer, err := l.blob(typeLayer, compressed.Bytes())
	if err != nil {
		return descriptor{}, err
	}
	d, err := l.json(typeManifest, manifest{SchemaVersion: 2, MediaType: typeManifest, Config: config, Layers: []descriptor{layer}})
	d.Platform = &platform{Architecture: image.Arch, OS: "linux"}
	return d, err
}

func (l layout) json(mediaType string, v any) (descriptor, error) {
	data, err := json.Marshal(v)
	if err != nil {
		return descriptor{}, err
	}
	return l.blob(mediaType, data)
}

func (l layout) blob(mediaType string, data []byte) (descriptor, error) {
	d := descriptor{MediaType: mediaType, Digest: digest(data), Size: len(data)}
	return d, os.WriteFile(filepath.Join(l.dir, hex(data)), data, 0o644)
}
