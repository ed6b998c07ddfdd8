package pack

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path"
	"slices"
	"strings"
	"time"
)

// Image is what one image is made of, for one platform.
type Image struct {
	// Name is the full reference, "docker.io/castellan/castellan-proxy:dev".
	Name string
	// Arch is the platform's, as Go calls it; the system is Linux.
	Arch string
	// Binary is the program's file; it becomes /usr/bin/BASE, BASE being the last
	// part of Name, and the entrypoint.
	Binary string
	// User is "UID" or "UID:GID", in numbers; empty means 0.
	User string
	// Files are further paths in the image with the files they are copied from,
	// read-only and executable.
	Files map[string]string
	// Labels are the image's, org.opencontainers.image.* by custom.
	Labels map[string]string
}

// epoch is the time of everything in an image.
var epoch = time.Unix(0, 0).UTC()

// packed is an image as its parts.
type packed struct {
	image  Image
	layer  []byte // tar, not compressed
	config []byte
}

// base is the last part of the name, without tag.
func (i Image) base() (string, error) {
	name, tag, ok := strings.Cut(path.Base(i.Name), ":")
	if !ok || name == "" || tag == "" || !strings.Contains(i.Name, "/") {
		return "", fmt.Errorf("image %q: want REGISTRY/REPOSITORY:TAG", i.Name)
	}
	return name, nil
}

func (i Image) pack() (*packed, error) {
	base, err := i.base()
	if err != nil {
		return nil, err
	}
	program := "/usr/bin/" + base
	files := maps.Clone(i.Files)
	if files == nil {
		files = map[string]string{}
	}
	files[program] = i.Binary
	if err := checkProgram(i.Binary, i.Arch, files); err != nil {
		return nil, fmt.Errorf("image %q: %w", i.Name, err)
	}
	layer, err := packLayer(files, i.User)
	if err != nil {
		return nil, fmt.Errorf("image %q: %w", i.Name, err)
	}
	config, err := json.Marshal(configFile{
		Created: epoch.Format(time.RFC3339), Architecture: i.Arch, OS: "linux",
		Config:  runConfig{User: i.User, Entrypoint: []string{program}, WorkingDir: "/", Labels: i.Labels},
		RootFS:  rootFS{Type: "layers", DiffIDs: []string{digest(layer)}},
		History: []history{{Created: epoch.Format(time.RFC3339), CreatedBy: "castellan deploy/images"}},
	})
	if err != nil {
		return nil, err
	}
	return &packed{image: i, layer: layer, config: config}, nil
}

// The image configuration of the OCI image specification, and Docker's before it.
type configFile struct {
	Created      string    `json:"created"`
	Architecture string    `json:"architecture"`
	OS           string    `json:"os"`
	Config       runConfig `json:"config"`
	RootFS       rootFS    `json:"rootfs"`
	History      []history `json:"history"`
}

type runConfig struct {
	User       string            `json:"User,omitempty"`
	Entrypoint []string          `json:"Entrypoint"`
	WorkingDir string            `json:"WorkingDir"`
	Labels     map[string]string `json:"Labels,omitempty"`
}

type rootFS struct {
	Type    string   `json:"type"`
	DiffIDs []string `json:"diff_ids"`
}

type history struct {
	Created   string `json:"created"`
	CreatedBy string `json:"created_by"`
}

func digest(data []byte) string { return fmt.Sprintf("sha256:%x", sha256.Sum256(data)) }

// packLayer writes the files, a name for the user (some programs look theirs up),
// and the folders they need.
func packLayer(files map[string]string, user string) ([]byte, error) {
	var layer bytes.Buffer
	out := tar.NewWriter(&layer)
	content := map[string][]byte{
		"etc/passwd": passwd(user),
		"etc/group":  group(user),
	}
	for target, source := range files {
		data, err := os.ReadFile(source)
		if err != nil {
			return nil, err
		}
		content[strings.TrimPrefix(path.Clean("/"+target), "/")] = data
	}
	made := map[string]bool{".": true}
	for _, name := range slices.Sorted(maps.Keys(content)) {
		if err := makeFolders(out, path.Dir(name), made); err != nil {
			return nil, err
		}
		mode := int64(0o555)
		if strings.HasPrefix(name, "etc/") {
			mode = 0o444
		}
		if err := writeFile(out, name, mode, content[name]); err != nil {
			return nil, err
		}
	}
	if err := out.Close(); err != nil {
		return nil, err
	}
	return layer.Bytes(), nil
}

func makeFolders(out *tar.Writer, dir string, made map[string]bool) error {
	if made[dir] {
		return nil
	}
	if err := makeFolders(out, path.Dir(dir), made); err != nil {
		return err
	}
	made[dir] = true
	return out.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir + "/", Mode: 0o755, ModTime: epoch, Format: tar.FormatPAX})
}

func writeFile(out *tar.Writer, name string, mode int64, data []byte) error {
	err := out.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode, Size: int64(len(data)), ModTime: epoch, Format: tar.FormatPAX})
	if err != nil {
		return err
	}
	_, err = out.Write(data)
	return err
}

func ids(user string) (uid, gid string) {
	uid, gid, ok := strings.Cut(user, ":")
	if !ok {
		gid = uid
	}
	return uid, gid
}

func passwd(user string) []byte {
	text := "root:x:0:0:root:/:/sbin/nologin\n"
	if uid, gid := ids(user); uid != "" && uid != "0" {
		text += fmt.Sprintf("castellan:x:%s:%s:castellan:/:/sbin/nologin\n", uid, gid)
	}
	return []byte(text)
}

func group(user string) []byte {
	text := "root:x:0:\n"
	if _, gid := ids(user); gid != "" && gid != "0" {
		text += fmt.Sprintf("castellan:x:%s:\n", gid)
	}
	return []byte(text)
}
