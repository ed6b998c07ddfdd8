package up

import (
	"log/slog"
	"os"
	"time"

	"github.com/go-jose/go-jose/v4"
)

type (
	State      = state
	Supervisor = supervisor
)

const (
	FirstPort, LastPort = firstPort, lastPort
	MaxLog              = maxLog
	StopGrace           = stopGrace
	RefreshEvery        = refreshEvery
	WorkloadTokenTTL    = workloadTokenTTL
	UserTokenTTL        = userTokenTTL
)

func LoadState(path, trustDomain string, names, uids []string) (*State, error) {
	return loadState(path, trustDomain, names, uids)
}

func (s *state) CheckPorts(wait time.Duration) error { return s.checkPorts(wait) }

func (s *state) Addr(name string) string { return s.addr(name) }

func WriteFile(path string, data []byte, mode os.FileMode) error { return writeFile(path, data, mode) }

func (f File) Write(path string) error { return f.write(path) }

func NewSupervisor(log *slog.Logger, logDir string) *Supervisor { return newSupervisor(log, logDir) }

// Child describes a part to supervise.
func Child(name, readyURL, path string, args ...string) process {
	return process{name: name, path: path, args: args, readyURL: readyURL}
}

// Prepare does everything of Run up to the first process.
func Prepare(cfg Config) (File, error) {
	m, err := newMesh(cfg)
	if err != nil {
		return File{}, err
	}
	for _, step := range []func() error{m.checkSockets, m.layout.make, m.prepare} {
		if err := step(); err != nil {
			return File{}, err
		}
	}
	return m.file(map[string]int{}), nil
}

// Issuers returns what keeps the one token file fresh.
func Issuers(keyFile, tokenFile_ string, lifetime time.Duration, now func() time.Time, log *slog.Logger) (*issuers, []byte, error) {
	i, err := openIssuer("https://issuer.test", keyFile, jose.ES256)
	if err != nil {
		return nil, nil, err
	}
	jwks, err := i.jwks()
	return &issuers{now: now, log: log, files: []tokenFile{{
		path: tokenFile_, issuer: i, audience: []string{"a"}, lifetime: lifetime, claims: map[string]any{"sub": "s"},
	}}}, jwks, err
}

func (i *issuers) Refresh() error { return i.refresh() }
