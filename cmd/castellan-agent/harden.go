package main

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// harden keeps the workloads' keys, which are in this process's memory only,
// from the disk (no core dumps) and from other processes of the same uid (not
// dumpable means no ptrace and no /proc/PID/mem).
func harden() error {
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("making the process undumpable: %w", err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("switching core dumps off: %w", err)
	}
	return nil
}
