package caclient

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"
)

const maxBundleFile = 1 << 20

// bundleFile is the file of roots that the server's certificate must chain to.
// It is looked at again for every use, and read again when it has changed; a
// version that cannot be read leaves the last good one in force.
type bundleFile struct {
	path string

	mu   sync.Mutex
	seen fileStamp
	good *roots
}

// roots is one good version of the file.
type roots struct {
	pool    *x509.CertPool
	version [sha256.Size]byte
}

type fileStamp struct {
	modified time.Time
	size     int64
	inode    os.FileInfo
}

func (s fileStamp) same(o fileStamp) bool {
	return s.inode != nil && o.inode != nil && s.size == o.size && s.modified.Equal(o.modified) && os.SameFile(s.inode, o.inode)
}

// current returns the roots in force. stale says why the file on disk is not
// what is in force; err is set when there has never been a good version, and
// then nothing is trusted.
func (b *bundleFile) current() (r *roots, stale error, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	loaded, stamp, err := b.load()
	switch {
	case err == nil && loaded == nil: // unchanged
	case err == nil:
		b.good, b.seen = loaded, stamp
	case b.good == nil:
		return nil, nil, fmt.Errorf("bundle file: %w", err)
	default:
		stale = fmt.Errorf("bundle file: %w", err)
	}
	return b.good, stale, nil
}

// load returns nil roots when the file is the one already in force.
func (b *bundleFile) load() (*roots, fileStamp, error) {
	info, err := os.Stat(b.path)
	if err != nil {
		return nil, fileStamp{}, err
	}
	stamp := fileStamp{modified: info.ModTime(), size: info.Size(), inode: info}
	if b.good != nil && stamp.same(b.seen) {
		return nil, stamp, nil
	}
	data, err := readBounded(b.path, maxBundleFile)
	if err != nil {
		return nil, stamp, err
	}
	certs, err := parsePEM(data)
	if err != nil {
		return nil, stamp, fmt.Errorf("%q: %w", b.path, err)
	}
	r := &roots{pool: x509.NewCertPool(), version: sha256.Sum256(data)}
	for _, c := range certs {
		r.pool.AddCert(c)
	}
	return r, stamp, nil
}

// parsePEM reads one or more certificates and nothing else. A file cut in the
// middle ends in text that is no block, and is refused whole.
func parsePEM(data []byte) ([]*x509.Certificate, error) {
	var certs []*x509.Certificate
	for len(trimSpace(data)) > 0 {
		block, rest := pem.Decode(data)
		if block == nil {
			return nil, errors.New("text that is no PEM block; is it half-written?")
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("PEM block of type %q, want CERTIFICATE", block.Type)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate %d: %w", len(certs)+1, err)
		}
		certs = append(certs, cert)
		data = rest
	}
	if len(certs) == 0 {
		return nil, errors.New("no certificate in it")
	}
	return certs, nil
}

func trimSpace(b []byte) []byte {
	for len(b) > 0 && (b[0] == ' ' || b[0] == '\n' || b[0] == '\r' || b[0] == '\t') {
		b = b[1:]
	}
	return b
}
