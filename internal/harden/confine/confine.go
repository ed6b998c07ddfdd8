// Package confine takes from a process all files but those it names, with what it
// may do to each, by Landlock. It needs no privilege, cannot be undone, and holds
// for every thread and for what the process starts.
//
// Where the kernel has no Landlock, or the container's sandbox keeps it away,
// nothing is taken and the caller is told. It refuses a path that is not there. Who
// owns files and their modes still decide besides.
package confine

import (
	"fmt"

	"github.com/landlock-lsm/go-landlock/landlock"
	ll "github.com/landlock-lsm/go-landlock/landlock/syscall"
)

// Grant is what a process may do below some paths.
type Grant struct {
	rule landlock.FSRule
}

// Read lets files and directories be read. Those that are not there are passed over.
func Read(paths ...string) Grant {
	return Grant{landlock.RODirs(paths...).IgnoreIfMissing()}
}

// ReadFiles lets these files be read. Those that are not there are passed over.
func ReadFiles(paths ...string) Grant {
	return Grant{landlock.ROFiles(paths...).IgnoreIfMissing()}
}

// Keep lets files, directories and sockets be made, read, replaced and removed.
func Keep(paths ...string) Grant {
	return Grant{landlock.PathAccess(ll.AccessFSReadFile|ll.AccessFSReadDir|ll.AccessFSWriteFile|ll.AccessFSTruncate|
		ll.AccessFSMakeReg|ll.AccessFSMakeDir|ll.AccessFSMakeSock|ll.AccessFSRemoveFile|ll.AccessFSRemoveDir, paths...)}
}

// Listen lets sockets be made and removed, and the directories they are in, and
// nothing be read or written.
func Listen(paths ...string) Grant {
	return Grant{landlock.PathAccess(ll.AccessFSMakeDir|ll.AccessFSMakeSock|ll.AccessFSRemoveFile|ll.AccessFSRemoveDir, paths...)}
}

// List lets directories be listed.
func List(paths ...string) Grant {
	return Grant{landlock.PathAccess(ll.AccessFSReadDir, paths...)}
}

// Files takes everything that is not granted. It returns the version of Landlock
// that holds it; 0 means that nothing was taken.
func Files(grants ...Grant) (version int, err error) {
	rules := make([]landlock.Rule, len(grants))
	for i, g := range grants {
		rules[i] = g.rule
	}
	// What the kernel's version does not know of, it cannot take; the rest it does.
	if err := landlock.V3.BestEffort().RestrictPaths(rules...); err != nil {
		return 0, fmt.Errorf("confine: %w", err)
	}
	version, err = ll.LandlockGetABIVersion()
	if err != nil {
		return 0, nil
	}
	return version, nil
}
