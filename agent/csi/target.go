package csi

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"regexp"
	"strings"

	"golang.org/x/sys/unix"
)

// Names that the kubelet makes paths of. None of them can be "..", hidden, or more
// than one part of a path.
var (
	volumeIDs   = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$`)
	podUIDs     = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9-]{0,62}$`)
	volumeNames = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)
	podNames    = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$`)
)

// target is a volume's place in the kubelet's directory:
// KUBELETDIR/pods/UID/volumes/kubernetes.io~csi/NAME/mount.
type target struct{ podUID, volume string }

const (
	volumesDir = "volumes"
	pluginDir  = "kubernetes.io~csi" // the kubelet's name for "kubernetes.io/csi"
	mountDir   = "mount"
)

var errTarget = errors.New("target path is not one of a pod's volume under the kubelet's directory")

// parseTarget takes a path apart; there is one form only.
func parseTarget(kubeletDir, p string) (target, error) {
	rest, ok := strings.CutPrefix(p, path.Join(kubeletDir, "pods")+"/")
	parts := strings.Split(rest, "/")
	if !ok || len(parts) != 5 {
		return target{}, errTarget
	}
	t := target{podUID: parts[0], volume: parts[3]}
	if parts[1] != volumesDir || parts[2] != pluginDir || parts[4] != mountDir ||
		!podUIDs.MatchString(t.podUID) || !volumeNames.MatchString(t.volume) {
		return target{}, errTarget
	}
	return t, nil
}

// openParent opens the directory that the kubelet made for the volume. Below the
// kubelet's own directory each part is opened from the one before it and must be
// a directory, so that no link, wherever it may have been put, is followed.
// (openat2 would say the same in one call, where kernel and sandbox know it.)
func (t target) openParent(kubeletDir string) (*os.File, error) {
	fd, err := unix.Open(path.Join(kubeletDir, "pods"), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("pods' directory: %w", err)
	}
	for _, part := range []string{t.podUID, volumesDir, pluginDir, t.volume} {
		next, err := openDir(fd, part)
		_ = unix.Close(fd) // it was opened for the next part only
		if err != nil {
			return nil, fmt.Errorf("pod's directory: %q: %w", part, err)
		}
		fd = next
	}
	return os.NewFile(uintptr(fd), t.volume), nil
}

func openDir(dir int, name string) (int, error) {
	return unix.Openat(dir, name, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
}

// open opens the volume's directory; make makes it where there is none.
func (t target) open(kubeletDir string, make bool) (*os.File, error) {
	parent, err := t.openParent(kubeletDir)
	if err != nil {
		return nil, err
	}
	defer parent.Close()
	if make {
		if err := makeMount(int(parent.Fd())); err != nil {
			return nil, fmt.Errorf("making %q: %w", mountDir, err)
		}
	}
	fd, err := openDir(int(parent.Fd()), mountDir)
	if err != nil {
		return nil, fmt.Errorf("volume's directory: %w", err)
	}
	return os.NewFile(uintptr(fd), t.volume), nil
}

// makeMount makes the volume's directory, which every uid of the pod may pass and
// nobody but root may write, whatever the umask.
func makeMount(parent int) error {
	if err := unix.Mkdirat(parent, mountDir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	fd, err := openDir(parent, mountDir)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }() // nothing was written to it
	// By the descriptor: fchmodat would follow a link. O_PATH descriptors cannot be
	// changed themselves.
	return unix.Chmod(fmt.Sprintf("/proc/self/fd/%d", fd), 0o755)
}

// remove removes the volume's directory, which must be empty.
func (t target) remove(kubeletDir string) error {
	parent, err := t.openParent(kubeletDir)
	if err != nil {
		return err
	}
	defer parent.Close()
	return unix.Unlinkat(int(parent.Fd()), mountDir, unix.AT_REMOVEDIR)
}
