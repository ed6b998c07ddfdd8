// Package harden takes from a process what it never needs, so that a fault in it
// is worth less: no new privileges, no core dumps, no memory for others to read.
//
// It refuses to go on when the kernel refuses one of these. It assumes Linux, and
// to be called first thing in main, before keys are read or made. What it does
// cannot be undone.
package harden

import (
	"errors"
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"
)

// Process hardens the calling process.
//
//   - no new privileges: nothing it could run, set-uid programs and file
//     capabilities included, gets more rights than it has;
//   - not dumpable: other processes of the same uid cannot ptrace it or read
//     /proc/PID/mem and /proc/PID/environ;
//   - no core dumps: keys, which are in memory only, stay from the disk.
func Process() error {
	if err := noNewPrivileges(); err != nil {
		return fmt.Errorf("harden: switching new privileges off: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("harden: making the process undumpable: %w", err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("harden: switching core dumps off: %w", err)
	}
	return nil
}

// noNewPrivileges sets the flag on every thread: it is a thread's own, and those
// that the runtime has started are not children of this one.
func noNewPrivileges() error {
	_, _, errno := syscall.AllThreadsSyscall6(syscall.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, 0)
	if errno == 0 {
		return nil
	}
	if errors.Is(errno, syscall.ENOTSUP) {
		// Built with cgo, which tests under the race detector are and nothing shipped
		// is: this thread and those it starts.
		return unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
	}
	return errno
}
