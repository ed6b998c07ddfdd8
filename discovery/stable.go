package discovery

import (
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"
)

// writers says whether anybody has a file open for writing.
type writers uint8

const (
	// writersUnknown: the system does not tell, or not this user.
	writersUnknown writers = iota
	writersNone
	writersOpen
)

// content is what one reading of a file found.
type content struct {
	data []byte
	// id tells the file from another one of the same name; "" where nothing does.
	id string
	// writers while it was read: with writersNone, data is no moment of somebody's writing.
	writers writers
}

// readFile reads a regular file, and never waits for a pipe's other end.
func readFile(path string) ([]byte, error) {
	c, err := readContent(path)
	return c.data, err
}

func readContent(path string) (content, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return content{}, err
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil {
		return content{}, err
	} else if !info.Mode().IsRegular() {
		return content{}, errors.New("not a regular file")
	}
	c := content{id: fileID(f)}
	var release func()
	c.writers, release = holdWriters(f)
	defer release()
	if c.data, err = io.ReadAll(io.LimitReader(f, maxFile+1)); err != nil {
		return content{}, err
	}
	if len(c.data) > maxFile {
		return content{}, fmt.Errorf("larger than %d bytes", maxFile)
	}
	return c, nil
}
