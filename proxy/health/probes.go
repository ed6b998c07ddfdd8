package health

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/singleflight"
	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"

	"castellan.dev/internal/config"
)

// maxBody is how much is read of an answer, as of the kubelet; none of it is kept.
const maxBody = 10 << 10

// DialFunc connects to the application.
type DialFunc func(ctx context.Context, network, address string) (net.Conn, error)

// Probes answers the configured probes by asking the application, at the address
// that was asked, which is the pod's.
func Probes(probes map[string]config.Probe, dial DialFunc, log *slog.Logger) http.Handler {
	return &prober{
		probes: probes, dial: dial, log: log, loud: rate.NewLimiter(1, 5),
		client: &http.Client{
			Transport: &http.Transport{
				DialContext: dial, DisableKeepAlives: true, DisableCompression: true, ForceAttemptHTTP2: true,
				MaxResponseHeaderBytes: 64 << 10,
				// As the kubelet: the question is whether it answers, not who does.
				TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, //nolint:gosec // see above
			},
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
	}
}

type prober struct {
	probes  map[string]config.Probe
	dial    DialFunc
	client  *http.Client
	log     *slog.Logger
	loud    *rate.Limiter
	flights singleflight.Group
}

// ServeHTTP answers with a status alone.
func (p *prober) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	probe, ok := p.probes[r.URL.Path]
	local, isTCP := r.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr)
	if !ok || !isTCP {
		http.NotFound(w, r)
		return
	}
	host := local.AddrPort().Addr().Unmap()
	timeout := time.Duration(probe.TimeoutSeconds) * time.Second
	// The server's own limit is for its own answers. Not to be had only where there is
	// no connection.
	_ = http.NewResponseController(w).SetWriteDeadline(time.Time{})
	agent := r.UserAgent()
	answer := p.flights.DoChan(host.String()+r.URL.Path, func() (any, error) {
		ctx, cancel := context.WithTimeout(context.Background(), timeout)
		defer cancel()
		return p.ask(ctx, probe, host, agent)
	})
	select {
	case <-r.Context().Done():
	case result := <-answer:
		status, _ := result.Val.(int)
		if result.Err != nil && p.loud.Allow() {
			p.log.Warn("the application's probe failed", "path", r.URL.Path, "error", result.Err)
		}
		w.WriteHeader(status)
	}
}

// ask returns the status to answer with; the error is for the log.
func (p *prober) ask(ctx context.Context, probe config.Probe, host netip.Addr, agent string) (status int, err error) {
	switch {
	case probe.HTTPGet != nil:
		status, err = p.askHTTP(ctx, probe.HTTPGet, host, agent)
	case probe.GRPC != nil:
		status, err = p.askGRPC(ctx, probe.GRPC, host, agent)
	case probe.TCPSocket != nil:
		status, err = p.askTCP(ctx, probe.TCPSocket, host)
	default:
		return http.StatusNotFound, nil
	}
	switch {
	case err != nil && ctx.Err() != nil:
		return http.StatusGatewayTimeout, fmt.Errorf("no answer in time: %w", err)
	case err != nil:
		return http.StatusServiceUnavailable, err
	}
	return status, nil
}

func (p *prober) askHTTP(ctx context.Context, probe *config.HTTPProbe, host netip.Addr, agent string) (int, error) {
	target, err := url.Parse(probe.Path)
	if err != nil {
		// As the kubelet: what is no URL is a path.
		target = &url.URL{Path: probe.Path}
	}
	if !strings.HasPrefix(target.Path, "/") {
		target.Path = "/" + target.Path
	}
	// Whatever the path says, the application is asked and nobody else.
	target.Scheme, target.Host, target.User = strings.ToLower(probe.Scheme), at(host, probe.Port), nil
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, target.String(), nil)
	if err != nil {
		return 0, err
	}
	req.Header.Set("User-Agent", agent)
	req.Header.Set("Accept", "*/*")
	seen := map[string]bool{}
	for _, h := range probe.HTTPHeaders {
		name := http.CanonicalHeaderKey(h.Name)
		if name == "Host" {
			req.Host = h.Value
			continue
		}
		if !seen[name] {
			req.Header.Del(name)
			seen[name] = true
		}
		req.Header.Add(name, h.Value)
	}
	resp, err := p.client.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	if _, err := io.CopyN(io.Discard, resp.Body, maxBody); err != nil && !errors.Is(err, io.EOF) {
		return 0, err
	}
	if resp.StatusCode < 200 {
		return 0, fmt.Errorf("status %d", resp.StatusCode)
	}
	if resp.StatusCode >= 400 {
		p.log.Debug("the application's probe was answered", "status", resp.StatusCode)
	}
	return resp.StatusCode, nil
}

func (p *prober) askTCP(ctx context.Context, probe *config.TCPProbe, host netip.Addr) (int, error) {
	conn, err := p.dial(ctx, "tcp", at(host, probe.Port))
	if err != nil {
		return 0, err
	}
	return http.StatusOK, conn.Close()
}

func (p *prober) askGRPC(ctx context.Context, probe *config.GRPCProbe, host netip.Addr, agent string) (int, error) {
	conn, err := grpc.NewClient("passthrough:///"+at(host, probe.Port),
		grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithUserAgent(agent), grpc.WithDisableServiceConfig(),
		grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) { return p.dial(ctx, "tcp", address) }),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxBody)))
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	resp, err := healthv1.NewHealthClient(conn).Check(ctx, &healthv1.HealthCheckRequest{Service: probe.Service})
	if err != nil {
		return 0, err
	}
	if resp.GetStatus() != healthv1.HealthCheckResponse_SERVING {
		return 0, fmt.Errorf("health is %s", resp.GetStatus())
	}
	return http.StatusOK, nil
}

func at(host netip.Addr, port uint16) string {
	return net.JoinHostPort(host.String(), strconv.Itoa(int(port)))
}
