package webhook

import (
	"context"
	"log/slog"
	"net/http"
	"time"

	"golang.org/x/time/rate"

	"castellan.dev/authz"
	"castellan.dev/internal/config"
	"castellan.dev/internal/workloads"
)

type fixed struct{ file *workloads.File }

func (f fixed) Current() *workloads.File { return f.file }

func bare(in *Injector, file *workloads.File) *Server {
	m, err := newMetrics(nil)
	if err != nil {
		panic(err)
	}
	s := &Server{cfg: Config{Injector: in, Workloads: fixed{file}, Now: time.Now}, log: slog.New(slog.DiscardHandler), metrics: m, budget: newBudget(), limit: rate.NewLimiter(10, 50)}
	if err := config.CheckMesh(&s.cfg.Mesh); err != nil {
		panic(err)
	}
	return s
}

// Handler is the server's without TLS.
func Handler(in *Injector, file *workloads.File) http.Handler { return bare(in, file).handler() }

// HandlerWithBudget comes with what takes room away.
func HandlerWithBudget(in *Injector) (http.Handler, func(context.Context, string, int64) (func(), error)) {
	s := bare(in, nil)
	return s.handler(), func(ctx context.Context, source string, n int64) (func(), error) {
		p, err := s.budget.take(ctx, source, n, nil)
		if err != nil {
			return nil, err
		}
		return p.release, nil
	}
}

// Bounded keeps warnings few.
func Bounded(warnings []string) []string { return bounded(warnings) }

// Split makes a message of errors, and warnings.
func Split(findings []authz.Finding) (string, []string) { return split(findings) }

// Turns are places to compute in; the function takes one.
func Turns() func(ctx context.Context, source string) (release func(), err error) {
	return newTurns().take
}
