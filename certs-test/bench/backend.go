package main

import (
	"bufio"
	"bytes"
	"flag"
	"fmt"
	"net"
	"path"
	"strconv"
)

// sizes are the bodies that the backend answers with; the last segment of a path names one.
var sizes = []int{0, 1 << 10, 16 << 10, 1 << 20}

// runBackend is the application behind every program of the comparison: a loop
// that costs little, so that what is measured is what stands before it.
func runBackend(args []string) error {
	fs := flag.NewFlagSet("backend", flag.ContinueOnError)
	listen := fs.String("listen", "", "address")
	if err := fs.Parse(args); err != nil {
		return err
	}
	answers := map[string][]byte{}
	for _, n := range sizes {
		head := fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n", n)
		answers[strconv.Itoa(n)] = append([]byte(head), bytes.Repeat([]byte("."), n)...)
	}
	l, err := net.Listen("tcp", *listen)
	if err != nil {
		return err
	}
	for {
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		go serveBackend(conn, answers)
	}
}

// serveBackend answers GET requests without a body until the connection ends.
func serveBackend(conn net.Conn, answers map[string][]byte) {
	defer conn.Close()
	r := bufio.NewReaderSize(conn, 4<<10)
	var answer []byte
	first := true
	for {
		line, err := r.ReadSlice('\n')
		if err != nil {
			return
		}
		switch {
		case first:
			fields := bytes.Fields(line)
			if len(fields) != 3 {
				return
			}
			answer, first = answers[path.Base(string(fields[1]))], false
		case len(bytes.TrimRight(line, "\r\n")) == 0:
			if answer == nil {
				answer = []byte("HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
			}
			if _, err := conn.Write(answer); err != nil {
				return
			}
			first = true
		}
	}
}
