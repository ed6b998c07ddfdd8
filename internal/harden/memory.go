package harden

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
)

const cgroups = "/sys/fs/cgroup"

// Memory returns the bytes that the calling process' control group may use (cgroup v2,
// memory.max; v1, memory.limit_in_bytes), 0 for any number, and has the collector keep
// below 85 percent of them: it would let the heap double first, and the kernel end the
// process. The rest is for what the kernel counts besides, sockets' buffers and the
// program's pages. A GOMEMLIMIT in the environment stays in force.
func Memory() (int64, error) {
	groups, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return 0, fmt.Errorf("harden: memory limit: %w", err)
	}
	limit, err := memoryLimit(groups, os.DirFS(cgroups))
	if err != nil || limit == 0 {
		return 0, err
	}
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(limit / 20 * 17)
	}
	return limit, nil
}

// memoryLimit is the least of those of the group and all above it. Within a container
// the root of the tree is the container's own group, whatever its name is outside.
func memoryLimit(groups []byte, tree fs.FS) (least int64, err error) {
	lines := bufio.NewScanner(bytes.NewReader(groups))
	for lines.Scan() {
		// ID:CONTROLLERS:PATH, as cgroups(7) says.
		fields := strings.SplitN(lines.Text(), ":", 3)
		if len(fields) != 3 {
			continue
		}
		at, file := ".", "memory.max"
		switch {
		case fields[0] == "0" && fields[1] == "":
		case fields[1] == "memory":
			at, file = "memory", "memory.limit_in_bytes"
		default:
			continue
		}
		for path := filepath.Join(at, fields[2]); ; path = filepath.Dir(path) {
			limit, err := readLimit(tree, filepath.Join(path, file))
			if err != nil {
				return 0, err
			}
			if limit > 0 && (least == 0 || limit < least) {
				least = limit
			}
			if path == at {
				break
			}
		}
	}
	return least, nil
}

// readLimit is 0 where there is no limit, or no such file.
func readLimit(tree fs.FS, path string) (int64, error) {
	data, err := fs.ReadFile(tree, path)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("harden: memory limit: %w", err)
	}
	text := strings.TrimSpace(string(data))
	if text == "max" {
		return 0, nil
	}
	limit, err := strconv.ParseInt(text, 10, 64)
	if err != nil || limit < 0 {
		return 0, fmt.Errorf("harden: memory limit: %s/%s says %q", cgroups, path, text)
	}
	if limit >= math.MaxInt64/2 { // how cgroup v1 says that there is none
		return 0, nil
	}
	return limit, nil
}
