package discovery

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// holdWriters finds out whether anybody has f open for writing, and keeps whoever
// wants to from opening it until release: the kernel grants a read lease only on a
// file without writers, and has the next one wait until the lease is given back.
// It asks for the file's owner or CAP_LEASE, and a file system that knows leases.
func holdWriters(f *os.File) (w writers, release func()) {
	err := lease(f, unix.F_RDLCK)
	switch {
	case err == nil:
		// Closing f gives the lease back as well.
		return writersNone, func() { _ = lease(f, unix.F_UNLCK) }
	case errors.Is(err, unix.EAGAIN):
		return writersOpen, func() {}
	default:
		return writersUnknown, func() {}
	}
}

func lease(f *os.File, kind int) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	if err = raw.Control(func(fd uintptr) { _, failed = unix.FcntlInt(fd, unix.F_SETLEASE, kind) }); err != nil {
		return err
	}
	return failed
}

// fileID is made of device, inode and, since inodes are used again at once, the
// time of birth where the file system keeps one.
func fileID(f *os.File) string {
	raw, err := f.SyscallConn()
	if err != nil {
		return ""
	}
	var st unix.Statx_t
	var failed error
	if err = raw.Control(func(fd uintptr) {
		failed = unix.Statx(int(fd), "", unix.AT_EMPTY_PATH, unix.STATX_INO|unix.STATX_BTIME, &st)
	}); err != nil || failed != nil {
		return ""
	}
	return fmt.Sprintf("%d:%d:%d:%d.%d", st.Dev_major, st.Dev_minor, st.Ino, st.Btime.Sec, st.Btime.Nsec)
}
