package cli_test

import (
	"bytes"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"castellan.dev/internal/cli"
	"castellan.dev/internal/tlsconf/tlsconftest"
)

// terminal returns both ends of a pseudo-terminal.
func terminal(t *testing.T) (control, tty *os.File) {
	t.Helper()
	control, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skipf("no terminals on this machine: %v", err)
	}
	t.Cleanup(func() { control.Close() })
	n, err := unix.IoctlGetInt(int(control.Fd()), unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(int(control.Fd()), unix.TIOCSPTLCK, 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	tty, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skipf("no terminals on this machine: %v", err)
	}
	t.Cleanup(func() { tty.Close() })
	return control, tty
}

func TestColour(t *testing.T) {
	file := chainFile(t, tlsconftest.NewRoot(t).SVIDIssuer(t).Leaf(t, ordersID))
	tests := map[string]struct {
		noColor, term string
		want          bool
	}{
		"a terminal":     {"", "xterm", true},
		"NO_COLOR":       {"1", "xterm", false},
		"NO_COLOR=0 too": {"0", "xterm", false},
		"dumb":           {"", "dumb", false},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Setenv("NO_COLOR", tt.noColor)
			t.Setenv("TERM", tt.term)
			control, tty := terminal(t)
			if code := cli.Main([]string{"castellan", "cert", "inspect", file}, strings.NewReader(""), tty, &bytes.Buffer{}); code != 0 {
				t.Fatalf("exit code %d", code)
			}
			var got bytes.Buffer
			buf := make([]byte, 4096)
			for !strings.Contains(got.String(), "signed by    CN=root") { // the last line
				n, err := control.Read(buf)
				if err != nil {
					t.Fatalf("%v after %q", err, got.String())
				}
				got.Write(buf[:n])
			}
			if coloured := strings.Contains(got.String(), "\x1b[1m"+ordersID+"\x1b[0m"); coloured != tt.want {
				t.Errorf("%q", got.String())
			}
		})
	}
}

// lockedBuffer is read while others may write.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// Work that takes more than two seconds says what it is about, once.
func TestProgress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out lockedBuffer
		stop := cli.Progress(&out, "reading 127.0.0.1:15012")
		time.Sleep(1900 * time.Millisecond)
		synctest.Wait()
		if out.String() != "" {
			t.Errorf("too early: %q", out.String())
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		stop()
		if out.String() != "reading 127.0.0.1:15012 …\n" {
			t.Errorf("%q", out.String())
		}
		var quick lockedBuffer
		cli.Progress(&quick, "x")()
		time.Sleep(time.Minute)
		synctest.Wait()
		if quick.String() != "" {
			t.Errorf("after the end: %q", quick.String())
		}
	})
}
