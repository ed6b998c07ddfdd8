package webhook

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/time/rate"

	"castellan.dev/api/policy"
	"castellan.dev/internal/config"
	"castellan.dev/internal/workloads"
)

// Paths of the two webhooks.
const (
	InjectPath   = "/inject"
	ValidatePath = "/validate"
)

const (
	readTimeout  = 10 * time.Second
	writeTimeout = 15 * time.Second
	idleTimeout  = 2 * time.Minute
	stopTimeout  = 5 * time.Second
	maxHeader    = 8 << 10
	// maxStreams of one HTTP/2 connection: an API server opens another when it has more
	// reviews. Each holds a head and a goroutine, read or not.
	maxStreams = 32
)

// Inventory says which workloads there are; it is discovery's.
type Inventory interface {
	Current() *workloads.File
}

// Namespaces knows the labels of namespaces.
type Namespaces interface {
	Labels(namespace string) (labels map[string]string, known bool)
}

// Config configures a Server.
type Config struct {
	// Listener takes the API server's connections; closed when Run returns.
	Listener net.Listener
	// GetCertificate is asked at every handshake, so that a renewed certificate counts at once.
	GetCertificate func(*tls.ClientHelloInfo) (*tls.Certificate, error)
	Injector       *Injector
	// Mesh settings that policies are validated under.
	Mesh policy.Mesh
	// Workloads, if known, are what a policy's selector is looked at with. Nil, or
	// nil from Current: nothing is said about what a policy selects.
	Workloads Inventory
	// Namespaces, if known, lets warnings speak of the namespace. They decide
	// nothing: that a pod is to be injected is the API server's word.
	Namespaces Namespaces
	Log        *slog.Logger
	Registerer prometheus.Registerer
	// Now is nil for the real clock.
	Now func() time.Time
}

// Server serves both webhooks.
type Server struct {
	cfg     Config
	log     *slog.Logger
	http    *http.Server
	metrics *metrics
	budget  *budget
	limit   *rate.Limiter // of log lines about refusals
}

// New checks cfg; it opens nothing and serves nothing before Run.
func New(cfg Config) (*Server, error) {
	switch {
	case cfg.Listener == nil:
		return nil, errors.New("webhook: no listener")
	case cfg.GetCertificate == nil:
		return nil, errors.New("webhook: no certificate")
	case cfg.Injector == nil:
		return nil, errors.New("webhook: no injector")
	}
	s := &Server{cfg: cfg, log: cfg.Log, budget: newBudget(), limit: rate.NewLimiter(10, 50)}
	if err := config.CheckMesh(&s.cfg.Mesh); err != nil {
		return nil, fmt.Errorf("webhook: mesh.%w", err)
	}
	if s.cfg.Now == nil {
		s.cfg.Now = time.Now
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	var err error
	if s.metrics, err = newMetrics(cfg.Registerer); err != nil {
		return nil, fmt.Errorf("webhook: metrics: %w", err)
	}
	s.http = &http.Server{
		Handler:           s.handler(),
		TLSConfig:         &tls.Config{MinVersion: tls.VersionTLS13, GetCertificate: cfg.GetCertificate, NextProtos: []string{"h2", "http/1.1"}},
		ReadHeaderTimeout: readTimeout / 2, // of the handshake too
		ReadTimeout:       readTimeout,
		WriteTimeout:      writeTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
		HTTP2:             &http.HTTP2Config{MaxConcurrentStreams: maxStreams},
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug), // handshakes of strangers
	}
	return s, nil
}

// Ready is nil while there is a certificate to serve with.
func (s *Server) Ready() error {
	cert, err := s.cfg.GetCertificate(&tls.ClientHelloInfo{})
	if err != nil {
		return fmt.Errorf("webhook: %w", err)
	}
	if cert == nil {
		return errors.New("webhook: no serving certificate yet")
	}
	return nil
}

// Run serves until ctx ends; then reviews under way have a moment to be answered.
func (s *Server) Run(ctx context.Context) error {
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		// The end must not wait for the context that just ended.
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
		defer cancel()
		if s.http.Shutdown(grace) != nil {
			s.http.Close()
		}
	})
	err := s.http.ServeTLS(s.cfg.Listener, "", "")
	if !stop() {
		<-stopped
	}
	if err != nil && !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("webhook.listen: %w", err)
	}
	return nil
}
