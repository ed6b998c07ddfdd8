package main

import (
	"os"
	"runtime/debug"
	"strconv"
	"strings"
)

// cgroupMemory is what the container's memory is limited to, where it is.
const cgroupMemory = "/sys/fs/cgroup/memory.max"

// limitHeap has the collector work harder before the kernel ends the process: Go
// would let the heap grow to twice of what is alive. GOMEMLIMIT, where set, decides
// instead; without a limit nothing changes.
func limitHeap() {
	if os.Getenv("GOMEMLIMIT") != "" {
		return
	}
	if text, err := os.ReadFile(cgroupMemory); err == nil {
		if limit := heapOf(string(text)); limit > 0 {
			debug.SetMemoryLimit(limit)
		}
	}
}

// heapOf leaves a seventh to the kernel's part of what counts: sockets' buffers,
// and pages of the program; 0 if there is no limit.
func heapOf(limit string) int64 {
	n, err := strconv.ParseInt(strings.TrimSpace(limit), 10, 64)
	if err != nil || n <= 0 { // "max"
		return 0
	}
	return n / 20 * 17
}
