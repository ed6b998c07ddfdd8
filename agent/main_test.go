package agent_test

import (
	"context"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	"castellan.dev/agent"
	"castellan.dev/agent/agenttest"
	"castellan.dev/internal/config"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const account = "shop/orders"

// node is one running agent with its configuration.
type node struct {
	t        *testing.T
	server   *agenttest.Server
	cfg      config.Agent
	registry *prometheus.Registry
	agent    *agent.Agent
	logs     *lines
	stop     func() error
}

// lines keeps what was logged.
type lines struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// configure returns an agent's configuration with one workload per account.
func configure(t *testing.T, s *agenttest.Server, accounts ...string) config.Agent {
	t.Helper()
	dir, err := os.MkdirTemp("", "agent") // short: a socket path has 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	cfg := config.Agent{
		Header: config.Header{APIVersion: config.APIVersion, Kind: "AgentConfig"}, TrustDomain: agenttest.TrustDomain,
		Node: "local", TokenFile: s.TokenFile(agenttest.AgentAccount, "agent-uid"), Server: config.ServerTarget{Address: s.Addr(), BundleFile: s.BundleFile},
	}
	for _, a := range accounts {
		ns, sa, _ := strings.Cut(a, "/")
		cfg.Workloads = append(cfg.Workloads, config.AgentWorkload{
			Namespace: ns, ServiceAccount: sa, Socket: filepath.Join(dir, sa, "s.sock"),
			UIDs: []uint32{uint32(os.Getuid())}, TokenFile: s.TokenFile(a, "uid-"+sa),
		})
	}
	if err := cfg.Validate(); err != nil {
		t.Fatal(err)
	}
	return cfg
}

// start runs an agent until the test ends or stop is called.
func start(t *testing.T, s *agenttest.Server, cfg config.Agent, change ...func(*agent.Agent)) *node {
	t.Helper()
	n := &node{t: t, server: s, cfg: cfg, registry: prometheus.NewRegistry(), logs: &lines{}}
	var err error
	n.agent, err = agent.New(agent.Config{
		Agent: cfg, Registerer: n.registry, Log: slog.New(slog.NewTextHandler(n.logs, &slog.HandlerOptions{Level: slog.LevelDebug})),
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range change {
		c(n.agent)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- n.agent.Run(ctx) }()
	n.stop = sync.OnceValue(func() error {
		cancel()
		return <-done
	})
	t.Cleanup(func() {
		if err := n.stop(); err != nil {
			t.Errorf("agent: %v", err)
		}
		if t.Failed() {
			t.Log(n.logs.String())
		}
	})
	// A client that comes before the socket would see an error that tests look for.
	for _, w := range cfg.Workloads {
		eventually(t, func() error {
			c, err := net.Dial("unix", w.Socket)
			if err == nil {
				c.Close()
			}
			return err
		})
	}
	return n
}

func (n *node) socket(i int) string { return "unix://" + n.cfg.Workloads[i].Socket }

// dial opens a plain gRPC connection to a workload's socket.
func (n *node) dial(i int) *grpc.ClientConn {
	n.t.Helper()
	conn, err := grpc.NewClient(n.socket(i), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { conn.Close() })
	return conn
}

// spiffe opens go-spiffe's client.
func (n *node) spiffe(i int) *workloadapi.Client {
	n.t.Helper()
	c, err := workloadapi.New(n.t.Context(), workloadapi.WithAddr(n.socket(i)))
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { c.Close() })
	return c
}

func (n *node) trustDomain() spiffeid.TrustDomain {
	return spiffeid.RequireTrustDomainFromString(n.cfg.TrustDomain)
}

func withHeader(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
}

// eventually polls until check returns nil.
func eventually(t *testing.T, check func() error) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("still: %v", err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func (n *node) ready() {
	n.t.Helper()
	for _, check := range n.agent.Checks() {
		eventually(n.t, check)
	}
}

// metric sums a metric's values, or a histogram's counts, over the label value given.
func (n *node) metric(name, label string) float64 {
	n.t.Helper()
	families, err := n.registry.Gather()
	if err != nil {
		n.t.Fatal(err)
	}
	sum := 0.0
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			matches := label == ""
			for _, l := range m.GetLabel() {
				matches = matches || l.GetValue() == label
			}
			if matches {
				sum += m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
			}
		}
	}
	return sum
}
