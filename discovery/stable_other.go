//go:build !linux

package discovery

import (
	"fmt"
	"os"
	"syscall"
)

// holdWriters cannot tell here.
func holdWriters(*os.File) (w writers, release func()) { return writersUnknown, func() {} }

func fileID(f *os.File) string {
	info, err := f.Stat()
	if err != nil {
		return ""
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return ""
	}
	return fmt.Sprintf("%d:%d", st.Dev, st.Ino)
}
