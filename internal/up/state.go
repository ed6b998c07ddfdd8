package up

import (
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"castellan.dev/internal/disk"
)

const (
	minSVIDTTL = 5 * time.Second
	maxSVIDTTL = 24 * time.Hour
)

// layout names the files under the data directory.
type layout struct{ dir string }

func (l layout) path(elem ...string) string {
	return filepath.Join(append([]string{l.dir}, elem...)...)
}

// private are the folders with keys, tokens and logs, which nobody else may read.
var private = []string{"server", "issuer", "tokens", "logs", "config", "sockets"}

// make makes the directory and its folders. It refuses what somebody else
// prepared: a link, another owner, or a folder that others may write to would let
// him put keys or tokens of his in place of ours, or have ours written where he
// can take them away.
func (l layout) make() error {
	if err := os.MkdirAll(l.dir, 0o755); err != nil {
		return fmt.Errorf("up: %w", err)
	}
	if err := ownDirectory(l.dir); err != nil {
		return err
	}
	for _, name := range private {
		path := l.path(name)
		if err := os.Mkdir(path, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("up: %w", err)
		}
		if err := ownDirectory(path); err != nil {
			return err
		}
	}
	return nil
}

// ownDirectory refuses what is not a directory of this user's alone to write to.
func ownDirectory(path string) error {
	st, err := os.Lstat(path)
	if err != nil {
		return fmt.Errorf("up: %w", err)
	}
	sys, ok := st.Sys().(*syscall.Stat_t)
	switch {
	case !st.IsDir():
		return inputErrorf("up: %s is not a directory (a link is not followed); choose another --data-dir", path)
	case !ok || int(sys.Uid) != os.Getuid():
		return inputErrorf("up: %s belongs to another user; choose another --data-dir", path)
	case st.Mode().Perm()&0o022 != 0:
		return inputErrorf("up: others may write to %s; run `chmod go-w %s` if you trust what is in it, or choose another --data-dir", path, path)
	}
	return nil
}

// state is what must stay the same from one start to the next.
type state struct {
	TrustDomain string `json:"trustDomain"`
	// Ports by the name of the part and its listener, e.g. "server/grpc".
	Ports map[string]int `json:"ports"`
	// UIDs of pods and service accounts, by "pod/ns/sa" and "account/ns/sa".
	UIDs map[string]string `json:"uids"`

	// fresh: there was no state before, so nothing else that names ports and UIDs holds.
	fresh bool
}

// Ports stand below the range the kernel takes outgoing ports from (32768 up),
// so that no connection sits on one while its listener is being restarted.
const (
	firstPort = 20000
	lastPort  = 31999
)

// loadState reads the saved state, or makes a new one with free ports for names.
// It is saved before anything listens.
func loadState(path, trustDomain string, names []string, uids []string) (*state, error) {
	s := &state{TrustDomain: trustDomain, Ports: map[string]int{}, UIDs: map[string]string{}}
	data, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		s.fresh = true
	case err != nil:
		return nil, fmt.Errorf("up: %w", err)
	default:
		if err := json.Unmarshal(data, s); err != nil {
			return nil, inputErrorf("up: %s is damaged (%w); restore it, or remove the data directory to start over", path, err)
		}
		if s.TrustDomain != trustDomain {
			return nil, inputErrorf("--trust-domain: %s holds the trust domain %q, not %q; give that one or another --data-dir", filepath.Dir(path), s.TrustDomain, trustDomain)
		}
	}
	changed := false
	next := 0
	for _, name := range names {
		if s.Ports[name] != 0 {
			continue
		}
		if next, err = freePort(next, s.Ports); err != nil {
			return nil, err
		}
		s.Ports[name], changed = next, true
		next++
	}
	for _, name := range uids {
		if s.UIDs[name] == "" {
			s.UIDs[name], changed = newUID(), true
		}
	}
	if !changed {
		return s, nil
	}
	out, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("up: %w", err)
	}
	return s, writeFile(path, out, 0o600)
}

// addr returns the loopback address of a named port.
func (s *state) addr(name string) string {
	return net.JoinHostPort("127.0.0.1", strconv.Itoa(s.Ports[name]))
}

// freePort finds a port nobody listens on, from start or from a random place.
func freePort(start int, taken map[string]int) (int, error) {
	used := map[int]bool{}
	for _, p := range taken {
		used[p] = true
	}
	if start < firstPort || start > lastPort {
		n, err := rand.Int(rand.Reader, big.NewInt(lastPort-firstPort))
		if err != nil {
			return 0, fmt.Errorf("up: %w", err)
		}
		start = firstPort + int(n.Int64())
	}
	for i := range lastPort - firstPort {
		port := firstPort + (start-firstPort+i)%(lastPort-firstPort)
		if used[port] {
			continue
		}
		l, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
		if err != nil {
			continue
		}
		l.Close()
		return port, nil
	}
	return 0, fmt.Errorf("up: no free port between %d and %d on 127.0.0.1", firstPort, lastPort)
}

// checkPorts refuses to start where a saved port is taken, and says by which part it is wanted.
func (s *state) checkPorts(wait time.Duration) error {
	deadline := time.Now().Add(wait) //nolint:forbidigo // waits for the kernel, not for a date
	for name := range s.Ports {
		for {
			l, err := net.Listen("tcp", s.addr(name))
			if err == nil {
				l.Close()
				break
			}
			// A part of a run that was killed a moment ago may still be going.
			if time.Now().After(deadline) { //nolint:forbidigo // as above
				return fmt.Errorf("up: %s, the port of %s in this data directory, is in use by another program; stop it, or remove state.json to get new ports", s.addr(name), name)
			}
			time.Sleep(50 * time.Millisecond)
		}
	}
	return nil
}

// newUID returns a random UID in the form Kubernetes uses (RFC 9562 version 4).
func newUID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails (crypto/rand)
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[0:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// writeFile replaces path in one step: readers see the old content or the new.
func writeFile(path string, data []byte, mode os.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("up: %w", err)
	}
	if err := disk.Write(path, data, mode); err != nil {
		return fmt.Errorf("up: %w", err)
	}
	return nil
}
