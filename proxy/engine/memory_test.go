package engine_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"castellan.dev/proxy/engine"
)

// BenchmarkIdleMemory reports the resident memory that an idle mTLS connection
// costs after one request, in a process of its own.
func BenchmarkIdleMemory(b *testing.B) {
	const conns = 1000
	if os.Getenv("ENGINE_IDLE_SERVER") != "" {
		serveIdle(b)
		return
	}
	cmd := exec.Command(os.Args[0], "-test.run=^$", "-test.bench=^BenchmarkIdleMemory$", "-test.benchtime=1x")
	cmd.Env = append(os.Environ(), "ENGINE_IDLE_SERVER=1")
	in, err := cmd.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	defer func() { in.Close(); cmd.Wait() }()
	var addr string
	for lines := bufio.NewScanner(out); addr == "" && lines.Scan(); {
		_, addr, _ = strings.Cut(lines.Text(), "listening on ")
	}
	_, client := benchTLS(b)
	client.InsecureSkipVerify = true // the child has a key of its own
	open := func(n int) {
		for range n {
			conn := tls.Client(dialTo(b, addr), client)
			b.Cleanup(func() { conn.Close() })
			io.WriteString(conn, benchRequest)
			if _, err := io.ReadFull(conn, make([]byte, len(benchResponse)+1024)); err != nil {
				b.Fatal(err)
			}
		}
	}
	open(10)
	before := resident(b, cmd.Process.Pid)
	open(conns)
	b.ReportMetric(float64(resident(b, cmd.Process.Pid)-before)/conns, "KiB/conn")
	b.ReportMetric(float64(before), "KiB-at-start")
}

// serveIdle serves mTLS until its standard input ends.
func serveIdle(b *testing.B) {
	addr := benchApp(b)
	server, _ := benchTLS(b)
	e := engine.New(engine.Config{})
	front := listen(b, func(c net.Conn) {
		e.ServeConn(context.Background(), tls.Server(c, server), false, newHot(addr))
	})
	fmt.Printf("\nlistening on %s\n", front)
	io.Copy(io.Discard, os.Stdin)
	os.Exit(0)
}

// resident reads a process's resident memory in KiB.
func resident(b *testing.B, pid int) int {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		b.Fatal(err)
	}
	_, after, _ := strings.Cut(string(status), "VmRSS:")
	n, err := strconv.Atoi(strings.Fields(after)[0])
	if err != nil {
		b.Fatal(err)
	}
	return n
}
