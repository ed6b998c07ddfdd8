package pack

import (
	"archive/tar"
	"encoding/json"
	"io"
	"strings"
)

// Archive writes an image of one platform as the tarball that docker save writes:
// what "ctr -n k8s.io images import" reads.
func Archive(w io.Writer, image Image) error {
	p, err := image.pack()
	if err != nil {
		return err
	}
	config := hex(p.config) + ".json"
	layer := hex(p.layer) + ".tar"
	manifest, err := json.Marshal([]map[string]any{{
		"Config": config, "RepoTags": []string{image.Name}, "Layers": []string{layer},
	}})
	if err != nil {
		return err
	}
	out := tar.NewWriter(w)
	for _, f := range []struct {
		name string
		data []byte
	}{{config, p.config}, {layer, p.layer}, {"manifest.json", manifest}} {
		if err := writeFile(out, f.name, 0o644, f.data); err != nil {
			return err
		}
	}
	return out.Close()
}

func hex(data []byte) string { return strings.TrimPrefix(digest(data), "sha256:") }
