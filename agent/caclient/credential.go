package caclient

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"sync"
	"syscall"

	"castellan.dev/identity"
)

// maxCredential bounds a token: the server refuses longer ones before it parses
// them.
const maxCredential = 8 << 10

// Credential is a token that proves who somebody is. It shows itself to nobody:
// every way of printing it says "[redacted]".
type Credential struct{ value string }

// NewCredential checks what can be checked of a token without its issuer's key:
// that it is bounded, and made of characters a header may carry.
func NewCredential(value string) (Credential, error) {
	value = strings.TrimSpace(value)
	if value == "" {
		return Credential{}, errors.New("token is empty")
	}
	if len(value) > maxCredential {
		return Credential{}, fmt.Errorf("token has more than %d bytes", maxCredential)
	}
	for _, c := range []byte(value) {
		// A byte outside of this would end the header, or begin another.
		if c <= ' ' || c >= 0x7f {
			return Credential{}, errors.New("token holds characters that no token has; is the file a token?")
		}
	}
	return Credential{value: value}, nil
}

// String hides the token.
func (Credential) String() string { return "[redacted]" }

// GoString hides the token from %#v.
func (Credential) GoString() string { return "[redacted]" }

// LogValue hides the token from slog.
func (Credential) LogValue() slog.Value { return slog.StringValue("[redacted]") }

// MarshalText hides the token from encoders.
func (Credential) MarshalText() ([]byte, error) { return []byte("[redacted]"), nil }

// CredentialFile is the path of a token. The file is read again for every use,
// because whoever keeps it fresh replaces it.
type CredentialFile string

// Read returns the token in the file.
func (f CredentialFile) Read() (Credential, error) {
	data, err := readBounded(string(f), maxCredential+2)
	if err != nil {
		return Credential{}, fmt.Errorf("token file: %w", err)
	}
	c, err := NewCredential(string(data))
	if err != nil {
		return Credential{}, fmt.Errorf("token file %q: %w", string(f), err)
	}
	return c, nil
}

// Token is where a credential is read from, each time it is used.
type Token interface {
	Read() (Credential, error)
	// Stamp changes when what Read returns may have.
	Stamp() Stamp
	// Where names the place in errors.
	Where() string
}

// Stamp tells one version of a token from the next without reading it.
type Stamp struct {
	at      fileStamp
	version uint64 // of what is in memory
}

// Where names the file.
func (f CredentialFile) Where() string { return fmt.Sprintf("token file %q", string(f)) }

// Stamp returns the file's stamp as it is now.
func (f CredentialFile) Stamp() Stamp {
	info, err := os.Stat(string(f))
	if err != nil {
		return Stamp{} // none: Read says why
	}
	return Stamp{at: fileStamp{modified: info.ModTime(), size: info.Size(), inode: info}}
}

// Same reports whether both are of one version; two of no file are.
func (s Stamp) Same(o Stamp) bool {
	if s.version != o.version {
		return false
	}
	if s.at.inode == nil || o.at.inode == nil {
		return s.at.inode == nil && o.at.inode == nil
	}
	return s.at.same(o.at)
}

// Held is a token that its giver brings and replaces: it is in memory, and nowhere
// else as far as this package goes.
type Held struct {
	where string

	mu      sync.Mutex
	now     Credential
	version uint64
}

// Hold returns a Held with its first token; where names it in errors.
func Hold(where string, c Credential) *Held { return &Held{where: where, now: c, version: 1} }

// Set replaces the token and reports whether it is another.
func (h *Held) Set(c Credential) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.now == c {
		return false
	}
	h.now = c
	h.version++
	return true
}

// Drop forgets the token; nothing is read after it.
func (h *Held) Drop() { h.Set(Credential{}) }

// Read returns the token.
func (h *Held) Read() (Credential, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.now.value == "" {
		return Credential{}, errors.New("token: there is none any more")
	}
	return h.now, nil
}

// Stamp returns the version that Read would return.
func (h *Held) Stamp() Stamp {
	h.mu.Lock()
	defer h.mu.Unlock()
	return Stamp{version: h.version}
}

// Where names the token.
func (h *Held) Where() string { return h.where }

// readBounded reads a regular file of at most limit bytes. A pipe or a device in
// its place is refused instead of waited for.
func readBounded(path string, limit int64) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%q is not a regular file", path)
	}
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(data)) > limit {
		return nil, fmt.Errorf("%q is larger than %d bytes", path, limit)
	}
	return data, nil
}

// Claims is what a token says of its bearer. Nobody has verified it: the server
// attests the token itself and is not told what is read here. It serves to name
// things in reports, and to find a wrong file before the server refuses it.
type Claims struct {
	Account identity.Account
	PodUID  string
	PodName string
	Node    string
}

// Claims reads the token's payload without verifying anything.
func (c Credential) Claims() (Claims, error) {
	parts := strings.Split(c.value, ".")
	if len(parts) != 3 {
		return Claims{}, errors.New("token is not a JWT of three parts")
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return Claims{}, errors.New("token payload is not base64url")
	}
	var body struct {
		Subject    string `json:"sub"`
		Kubernetes struct {
			Namespace string `json:"namespace"`
			Pod       struct{ Name, UID string }
			Node      struct{ Name string }
		} `json:"kubernetes.io"`
	}
	// The error of the decoder would quote the payload.
	if json.Unmarshal(payload, &body) != nil {
		return Claims{}, errors.New("token payload is not the JSON of a service account's token")
	}
	name, ok := strings.CutPrefix(body.Subject, "system:serviceaccount:")
	ns, sa, found := strings.Cut(name, ":")
	if !ok || !found {
		return Claims{}, fmt.Errorf("token subject %q is no service account", body.Subject)
	}
	account, err := identity.NewAccount(ns, sa)
	if err != nil {
		return Claims{}, fmt.Errorf("token subject: %w", err)
	}
	return Claims{
		Account: account,
		PodUID:  body.Kubernetes.Pod.UID, PodName: body.Kubernetes.Pod.Name,
		Node: body.Kubernetes.Node.Name,
	}, nil
}
