// Package blobstest holds every keeper of the authority's documents to the same
// promises, and has one in memory for tests of what is built on it.
package blobstest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"sync"
	"testing"

	"castellan.dev/ca"
)

// Place is somewhere documents are kept.
type Place struct {
	// Open returns a handle as a started server gets it; each call is a restart.
	Open func(t *testing.T) ca.Blobs
	// Interfere writes the document behind the handles' backs. Nil where nobody can:
	// a lock keeps them out.
	Interfere func(t *testing.T, name string, data []byte)
}

// Run holds a place to the promises of ca.Blobs. make returns a new, empty one.
func Run(t *testing.T, make func(t *testing.T) Place) {
	for name, test := range map[string]func(*testing.T, Place){
		"nothing there":        nothing,
		"what is written":      roundTrip,
		"replaced":             replaced,
		"names are apart":      apart,
		"bytes are copies":     copies,
		"bad names":            badNames,
		"given up":             givenUp,
		"places have names":    places,
		"at the same time":     concurrent,
		"somebody else writes": interfered,
	} {
		t.Run(name, func(t *testing.T) { test(t, make(t)) })
	}
}

const document = "root.pem"

func write(t *testing.T, b ca.Blobs, name, text string) {
	t.Helper()
	if err := b.Write(t.Context(), name, []byte(text)); err != nil {
		t.Fatal(err)
	}
}

func want(t *testing.T, b ca.Blobs, name, text string) {
	t.Helper()
	got, err := b.Read(t.Context(), name)
	if err != nil || string(got) != text {
		t.Fatalf("%s is %q, %v; want %q", name, got, err, text)
	}
}

func nothing(t *testing.T, p Place) {
	for _, name := range ca.BlobNames() {
		if data, err := p.Open(t).Read(t.Context(), name); !errors.Is(err, fs.ErrNotExist) || data != nil {
			t.Errorf("%q: %q, %v", name, data, err)
		}
	}
}

func roundTrip(t *testing.T, p Place) {
	b := p.Open(t)
	binary := string([]byte{0, 255, '\n', 0})
	write(t, b, document, binary)
	want(t, b, document, binary)
	want(t, p.Open(t), document, binary)
}

func replaced(t *testing.T, p Place) {
	b := p.Open(t)
	for _, text := range []string{"first", "second and longer", "3"} {
		write(t, b, document, text)
		want(t, b, document, text)
	}
	b = p.Open(t)
	want(t, b, document, "3")
	write(t, b, document, "after a restart")
	want(t, p.Open(t), document, "after a restart")
}

func apart(t *testing.T, p Place) {
	b := p.Open(t)
	for _, name := range ca.BlobNames() {
		write(t, b, name, "of "+name)
	}
	b = p.Open(t)
	for _, name := range ca.BlobNames() {
		want(t, b, name, "of "+name)
	}
}

func copies(t *testing.T, p Place) {
	b := p.Open(t)
	data := []byte("mine")
	if err := b.Write(t.Context(), document, data); err != nil {
		t.Fatal(err)
	}
	copy(data, "your")
	want(t, b, document, "mine")
	got, err := b.Read(t.Context(), document)
	if err != nil {
		t.Fatal(err)
	}
	copy(got, "your")
	want(t, b, document, "mine")
}

func badNames(t *testing.T, p Place) {
	b := p.Open(t)
	for _, name := range []string{"", ".", "..", ".hidden", "a/b", "../root.pem", "/etc/passwd", "a\x00b", "Upper", strings.Repeat("x", 300)} {
		if _, err := b.Read(t.Context(), name); err == nil || errors.Is(err, fs.ErrNotExist) {
			t.Errorf("read %q: %v", name, err)
		}
		if err := b.Write(t.Context(), name, []byte("x")); err == nil {
			t.Errorf("wrote %q", name)
		}
	}
}

func givenUp(t *testing.T, p Place) {
	b := p.Open(t)
	write(t, b, document, "before")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := b.Write(ctx, document, []byte("after")); !errors.Is(err, context.Canceled) {
		t.Errorf("write: %v", err)
	}
	want(t, b, document, "before")
	want(t, p.Open(t), document, "before")
}

func places(t *testing.T, p Place) {
	b := p.Open(t)
	all, one := b.Where(""), b.Where(document)
	if all == "" || !strings.Contains(one, document) || one == all {
		t.Errorf("all: %q, one: %q", all, one)
	}
}

func concurrent(t *testing.T, p Place) {
	b := p.Open(t)
	var wg sync.WaitGroup
	for _, name := range ca.BlobNames() {
		wg.Go(func() {
			for i := range 5 {
				if err := b.Write(t.Context(), name, fmt.Appendf(nil, "%s %d", name, i)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	b = p.Open(t)
	for _, name := range ca.BlobNames() {
		want(t, b, name, name+" 4")
	}
}

// interfered: what somebody else wrote is not overwritten, not even a document of
// another name than ours; a restart, which reads it, may go on.
func interfered(t *testing.T, p Place) {
	if p.Interfere == nil {
		return
	}
	b := p.Open(t)
	write(t, b, document, "ours")
	want(t, b, document, "ours")
	for _, name := range []string{document, ca.BlobNames()[1]} {
		p.Interfere(t, name, []byte("theirs"))
		for range 2 { // it does not wear off
			err := b.Write(t.Context(), document, []byte("ours again"))
			if err == nil || !strings.Contains(err.Error(), "another server") {
				t.Fatalf("over what somebody wrote to %s: %v", name, err)
			}
		}
		want(t, p.Open(t), name, "theirs")
		b = p.Open(t)
		want(t, b, document, map[bool]string{true: "theirs", false: "ours"}[name == document])
		write(t, b, document, "ours")
	}
}

// Memory keeps documents in memory.
type Memory struct {
	mu   sync.Mutex
	docs map[string][]byte
	fail error
	told bool
}

var _ interface {
	ca.Blobs
	ca.Beginner
} = (*Memory)(nil)

// Fail makes every call fail from now on; nil ends it.
func (m *Memory) Fail(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.fail = err
}

// Tell says that a new root is wanted.
func (m *Memory) Tell() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.told = true
}

// Remove forgets everything.
func (m *Memory) Remove() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.docs = nil
}

// Names returns how many documents there are.
func (m *Memory) Names() map[string]int {
	m.mu.Lock()
	defer m.mu.Unlock()
	sizes := map[string]int{}
	for name, data := range m.docs {
		sizes[name] = len(data)
	}
	return sizes
}

// Where implements ca.Blobs.
func (m *Memory) Where(name string) string {
	if name == "" {
		return "memory"
	}
	return "memory, document " + name
}

// Read implements ca.Blobs.
func (m *Memory) Read(ctx context.Context, name string) ([]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.check(ctx, name); err != nil {
		return nil, err
	}
	data, ok := m.docs[name]
	if !ok {
		return nil, fs.ErrNotExist
	}
	return bytes.Clone(data), nil
}

// Write implements ca.Blobs.
func (m *Memory) Write(ctx context.Context, name string, data []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.check(ctx, name); err != nil {
		return err
	}
	if m.docs == nil {
		m.docs = map[string][]byte{}
	}
	m.docs[name], m.told = bytes.Clone(data), false
	return nil
}

func (m *Memory) check(ctx context.Context, name string) error {
	if m.fail != nil {
		return m.fail
	}
	for _, n := range ca.BlobNames() {
		if n == name {
			return ctx.Err()
		}
	}
	return fmt.Errorf("%q is no name of a document", name)
}

// MayBegin implements ca.Beginner.
func (m *Memory) MayBegin(context.Context) (bool, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.told, m.fail
}

// HowToBegin implements ca.Beginner.
func (m *Memory) HowToBegin() string { return "tell" }
