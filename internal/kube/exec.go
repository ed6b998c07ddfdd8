package kube

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/util/exec"
	"k8s.io/klog/v2"
	"k8s.io/streaming/pkg/httpstream"
)

// maxStderr is what is kept of a program's standard error for a message: its end.
const maxStderr = 2 << 10

// Exec is a program to run in a container.
type Exec struct {
	Namespace, Pod, Container string
	Command                   []string
}

// Dial runs a program in a container, and returns a connection to its standard
// input and output. The program must speak first, as gRPC servers do: until then
// Dial waits, so that what kept it from running is the error of this call. Closing
// the connection ends the program's standard input.
//
// RBAC: create on pods/exec in the pod's namespace.
func (c *Client) Dial(ctx context.Context, e Exec) (net.Conn, error) {
	var refused error
	executor, err := c.executor(e, func(err error) { refused = err })
	if err != nil {
		return nil, fmt.Errorf("kube: %w", err)
	}
	// What the library would log is in the error.
	life, end := context.WithCancel(klog.NewContext(context.WithoutCancel(ctx), logr.Discard()))
	near, far := net.Pipe()
	conn := &execConn{Conn: near, end: end, done: make(chan struct{})}
	spoken := &firstWrite{Writer: far, done: make(chan struct{})}
	stderr := &tail{}
	go func() {
		defer close(conn.done)
		err := executor.StreamWithContext(life, remotecommand.StreamOptions{Stdin: far, Stdout: spoken, Stderr: stderr})
		conn.err = e.ended(err, refused, stderr.String())
		far.Close()
	}()
	select {
	case <-spoken.done:
		return conn, nil
	case <-conn.done:
		end()
		return nil, conn.err
	case <-ctx.Done():
		// Not waited for: the library does not give up a handshake that hangs.
		near.Close()
		end()
		return nil, fmt.Errorf("kube: pod %s/%s: %s has not answered: %w", e.Namespace, e.Pod, e.Command[0], ctx.Err())
	}
}

// executor prefers WebSocket, and takes SPDY where a proxy or the API server does
// not upgrade to that: an older one wants the verb get for it, which those who may
// only create have not. What it says then is told to refused.
func (c *Client) executor(e Exec, refused func(error)) (remotecommand.Executor, error) {
	rc := c.RESTConfig()
	if rc == nil {
		return nil, errors.New("programs cannot be run through a client made elsewhere")
	}
	rc.APIPath, rc.GroupVersion = "/api", &corev1.SchemeGroupVersion
	rc.NegotiatedSerializer = scheme.Codecs.WithoutConversion()
	client, err := rest.RESTClientFor(rc)
	if err != nil {
		return nil, err
	}
	url := client.Post().Namespace(e.Namespace).Resource("pods").Name(e.Pod).SubResource("exec").
		VersionedParams(&corev1.PodExecOptions{Container: e.Container, Command: e.Command, Stdin: true, Stdout: true, Stderr: true}, scheme.ParameterCodec).URL()
	primary, err := remotecommand.NewWebSocketExecutor(rc, "GET", url.String())
	if err != nil {
		return nil, err
	}
	secondary, err := remotecommand.NewSPDYExecutor(rc, "POST", url)
	if err != nil {
		return nil, err
	}
	return remotecommand.NewFallbackExecutor(primary, secondary, func(err error) bool {
		var failed *httpstream.UpgradeFailureError
		if errors.As(err, &failed) {
			refused(failed.Cause)
			return true
		}
		return httpstream.IsHTTPSProxyError(err)
	})
}

// ended says what the end of the program means, with what to do about it. refused is
// what the API server said to the first attempt, if it did not upgrade: of the second
// there is text only.
func (e Exec) ended(err, refused error, stderr string) error {
	at := fmt.Sprintf("kube: pod %s/%s", e.Namespace, e.Pod)
	var exit exec.CodeExitError
	switch {
	case errors.As(err, &exit):
		return fmt.Errorf("%s: %s ended with code %d: %s", at, e.Command[0], exit.Code, orNothing(stderr))
	case err == nil || errors.Is(err, context.Canceled):
		return fmt.Errorf("%s: %s ended: %s", at, e.Command[0], orNothing(stderr))
	case apierrors.IsForbidden(refused):
		return fmt.Errorf("%s: %w; this needs the verb create on pods/exec in namespace %s", at, err, e.Namespace)
	case apierrors.IsNotFound(refused):
		return fmt.Errorf("%s: %w; it may have been replaced just now: try again", at, err)
	}
	return fmt.Errorf("%s: %w; is its container running, and does the API server reach the node's kubelet?", at, err)
}

func orNothing(stderr string) string {
	if s := strings.TrimSpace(stderr); s != "" {
		return s
	}
	return "it said nothing"
}

// execConn is the near end of a running program. Its reads and writes fail with why
// the program ended.
type execConn struct {
	net.Conn
	end  context.CancelFunc
	done chan struct{}
	err  error // once done is closed
}

func (c *execConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	return n, c.cause(err)
}

func (c *execConn) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	return n, c.cause(err)
}

func (c *execConn) cause(err error) error {
	if !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrClosedPipe) {
		return err
	}
	select {
	case <-c.done:
		return c.err
	default:
		return err
	}
}

// Close ends the program and waits until nothing of ours is left of it.
func (c *execConn) Close() error {
	err := c.Conn.Close()
	c.end()
	<-c.done
	return err
}

// firstWrite closes done before the first byte.
type firstWrite struct {
	io.Writer
	once sync.Once
	done chan struct{}
}

func (f *firstWrite) Write(b []byte) (int, error) {
	f.once.Do(func() { close(f.done) })
	return f.Writer.Write(b)
}

// tail keeps the end of what is written.
type tail struct {
	mu   sync.Mutex
	kept []byte
}

func (t *tail) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.kept = append(t.kept, b[max(0, len(b)-maxStderr):]...)
	t.kept = append([]byte(nil), t.kept[max(0, len(t.kept)-maxStderr):]...)
	return len(b), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.ToValidUTF8(string(t.kept), "?")
}
