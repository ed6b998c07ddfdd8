package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"sync"
	"time"
)

// A part is one program of the cluster.
type part struct {
	name string
	args []string
	// ready says nil once the part answers.
	ready func(context.Context) error
}

// parts runs the cluster's programs. One that ends by itself is started again, as a
// node's service manager would; one that was killed stays down until it is started.
type parts struct {
	logs string

	mu      sync.Mutex
	known   map[string]part
	running map[string]*exec.Cmd
	ended   map[string]chan struct{}
}

func newParts(logs string) *parts {
	return &parts{logs: logs, known: map[string]part{}, running: map[string]*exec.Cmd{}, ended: map[string]chan struct{}{}}
}

// add makes a part known and starts it.
func (p *parts) add(ctx context.Context, part part) error {
	p.mu.Lock()
	p.known[part.name] = part
	p.mu.Unlock()
	return p.start(ctx, part.name)
}

// start starts a part that is down, and waits until it answers.
func (p *parts) start(ctx context.Context, name string) error {
	p.mu.Lock()
	part, ok := p.known[name]
	p.mu.Unlock()
	if !ok {
		return fmt.Errorf("there is no %q", name)
	}
	if err := p.spawn(part); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if err := poll(ctx, part.ready); err != nil {
		return fmt.Errorf("%s does not answer: %w; see %s", name, err, p.log(name))
	}
	return nil
}

func (p *parts) log(name string) string { return p.logs + "/" + name + ".log" }

var errRuns = errors.New("runs already")

func (p *parts) spawn(part part) error {
	log, err := os.OpenFile(p.log(part.name), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(part.args[0], part.args[1:]...)
	cmd.Stdout, cmd.Stderr = log, log
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, runs := p.running[part.name]; runs {
		return errRuns
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	ended := make(chan struct{})
	p.running[part.name], p.ended[part.name] = cmd, ended
	go p.watch(part, cmd, ended)
	return nil
}

// watch starts a part again that ended without having been killed.
func (p *parts) watch(part part, cmd *exec.Cmd, ended chan struct{}) {
	err := cmd.Wait()
	close(ended)
	p.mu.Lock()
	crashed := p.running[part.name] == cmd
	if crashed {
		delete(p.running, part.name)
	}
	p.mu.Unlock()
	if !crashed {
		return
	}
	fmt.Fprintf(os.Stderr, "%s ended: %v\n", part.name, err)
	time.Sleep(time.Second)
	if err := p.spawn(part); err != nil && !errors.Is(err, errRuns) {
		fmt.Fprintf(os.Stderr, "%s: %v\n", part.name, err)
	}
}

// kill ends a part at once, as a crash would, and returns when it is gone.
func (p *parts) kill(name string) error {
	p.mu.Lock()
	cmd, ok := p.running[name]
	ended := p.ended[name]
	delete(p.running, name)
	p.mu.Unlock()
	if !ok {
		return fmt.Errorf("%q is not running", name)
	}
	if err := cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	<-ended
	return nil
}

// poll asks until the answer is nil or ctx is done, and then says the last answer.
func poll(ctx context.Context, check func(context.Context) error) error {
	for {
		err := check(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// run runs a program to its end and puts what it said into the error.
func run(args ...string) error {
	out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", args[0], err, out)
	}
	return nil
}
