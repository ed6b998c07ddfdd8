package daemon

import (
	"errors"
	"fmt"
	"os"
	"os/exec"

	"golang.org/x/sys/unix"
)

// Init is the first process of the cluster's PID namespace: it starts the daemon and
// reaps orphans, and when the daemon ends, so does everything.
func Init(dir string) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("mounts private: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	cmd := exec.Command("/proc/self/exe", "daemon", dir)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	for fd := listenerFD; fd <= reportFD; fd++ {
		cmd.ExtraFiles = append(cmd.ExtraFiles, os.NewFile(uintptr(fd), "inherited"))
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	for _, f := range cmd.ExtraFiles {
		f.Close()
	}
	for {
		pid, err := unix.Wait4(-1, nil, 0, nil)
		switch {
		case pid == cmd.Process.Pid:
			return errors.New("the daemon ended")
		case err != nil && !errors.Is(err, unix.EINTR):
			return fmt.Errorf("wait: %w", err)
		}
	}
}
