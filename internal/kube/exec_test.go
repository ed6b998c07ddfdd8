package kube_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"

	"castellan.dev/internal/kube"
)

// Channels of the exec protocol, as its messages' first byte.
const (
	stdin  = 0
	stdout = 1
	stderr = 2
	status = 3
)

// execProgram is what runs in the container of the API server below: it greets, echoes
// its input until that ends, and then ends with a code, having complained.
type execProgram struct {
	// silent programs end at once.
	silent bool
	code   int
}

const greeting = "hello\n"

func (p execProgram) run(in io.Reader, out, errw io.Writer) metav1.Status {
	if !p.silent {
		fmt.Fprint(out, greeting)
		_, _ = io.Copy(out, in)
	}
	fmt.Fprint(errw, strings.Repeat("long ago\n", 1000)+"the socket does not answer\n")
	if p.code == 0 {
		return metav1.Status{Status: metav1.StatusSuccess}
	}
	return metav1.Status{
		Status: metav1.StatusFailure, Reason: "NonZeroExitCode", Message: "command terminated",
		Details: &metav1.StatusDetails{Causes: []metav1.StatusCause{{Type: "ExitCode", Message: fmt.Sprint(p.code)}}},
	}
}

// channel is one stream of a WebSocket.
type channel struct {
	conn *websocket.Conn
	id   byte
}

func (c channel) Write(b []byte) (int, error) {
	return len(b), c.conn.WriteMessage(websocket.BinaryMessage, append([]byte{c.id}, b...))
}

func (p execProgram) overWebSocket(t *testing.T, w http.ResponseWriter, r *http.Request) {
	upgrader := websocket.Upgrader{Subprotocols: []string{"v5.channel.k8s.io"}}
	conn, err := upgrader.Upgrade(w, r, nil)
	if err != nil {
		t.Error(err)
		return
	}
	defer conn.Close()
	in, typed := io.Pipe()
	go func() {
		defer typed.Close()
		for {
			_, m, err := conn.ReadMessage()
			if err != nil || len(m) == 2 && m[0] == 255 && m[1] == stdin {
				return
			}
			if m[0] == stdin {
				_, _ = typed.Write(m[1:])
			}
		}
	}()
	ended := p.run(in, channel{conn, stdout}, channel{conn, stderr})
	data, err := json.Marshal(ended)
	if err != nil {
		t.Error(err)
	}
	_, _ = channel{conn, status}.Write(data)
	_ = conn.WriteControl(websocket.CloseMessage, websocket.FormatCloseMessage(websocket.CloseNormalClosure, ""), time.Now().Add(time.Second))
}

func (p execProgram) overSPDY(t *testing.T, w http.ResponseWriter, r *http.Request) {
	streams := map[string]httpstream.Stream{}
	made := make(chan httpstream.Stream, 4)
	if _, err := httpstream.Handshake(r, w, []string{"v4.channel.k8s.io"}); err != nil {
		t.Error(err)
		return
	}
	conn := spdy.NewResponseUpgrader().UpgradeResponse(w, r, func(s httpstream.Stream, _ <-chan struct{}) error {
		made <- s
		return nil
	})
	if conn == nil {
		return
	}
	defer conn.Close()
	for len(streams) < 4 {
		select {
		case s := <-made:
			streams[s.Headers().Get(corev1.StreamType)] = s
		case <-time.After(30 * time.Second):
			t.Error("streams are missing")
			return
		}
	}
	ended := p.run(streams[corev1.StreamTypeStdin], streams[corev1.StreamTypeStdout], streams[corev1.StreamTypeStderr])
	data, err := json.Marshal(ended)
	if err != nil {
		t.Error(err)
	}
	_, _ = streams[corev1.StreamTypeError].Write(data)
	for _, s := range streams {
		s.Close()
	}
	<-conn.CloseChan()
}

// apiServer answers exec as handle does.
func apiServer(t *testing.T, handle func(t *testing.T, w http.ResponseWriter, r *http.Request)) *kube.Client {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if want := "/api/v1/namespaces/castellan-system/pods/server-0/exec"; r.URL.Path != want {
			t.Errorf("asked for %s, want %s", r.URL.Path, want)
		}
		if got := r.URL.Query()["command"]; len(got) != 2 || got[1] != "admin-stdio" {
			t.Errorf("command %q", got)
		}
		handle(t, w, r)
	}))
	t.Cleanup(s.Close)
	client, err := kube.New(&rest.Config{Host: s.URL}, "castellan-system")
	if err != nil {
		t.Fatal(err)
	}
	return client
}

func isWebSocket(r *http.Request) bool { return websocket.IsWebSocketUpgrade(r) }

// refuse answers as the API server's authorization does.
func refuse(w http.ResponseWriter, code int, reason metav1.StatusReason, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(metav1.Status{
		TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: metav1.StatusFailure,
		Reason: reason, Code: int32(code), Message: message,
	})
}

func dial(t *testing.T, c *kube.Client) (net.Conn, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	return c.Dial(ctx, kube.Exec{Namespace: "castellan-system", Pod: "server-0", Container: "castellan-server", Command: []string{"castellan-server", "admin-stdio"}})
}

func TestDial(t *testing.T) {
	for name, handle := range map[string]func(*testing.T, http.ResponseWriter, *http.Request){
		"websocket": func(t *testing.T, w http.ResponseWriter, r *http.Request) {
			execProgram{code: 3}.overWebSocket(t, w, r)
		},
		"spdy where websocket is not to be had": func(t *testing.T, w http.ResponseWriter, r *http.Request) {
			if isWebSocket(r) {
				refuse(w, http.StatusForbidden, metav1.StatusReasonForbidden, `pods "server-0" is forbidden: User "op" cannot get resource "pods/exec"`)
				return
			}
			execProgram{code: 3}.overSPDY(t, w, r)
		},
	} {
		t.Run(name, func(t *testing.T) {
			conn, err := dial(t, apiServer(t, handle))
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if err := conn.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
				t.Fatal(err)
			}
			// More than any buffer on the way holds.
			sent := strings.Repeat("0123456789abcdef", 64<<10)
			go func() { _, _ = io.WriteString(conn, sent) }()
			got := make([]byte, len(greeting)+len(sent))
			if _, err := io.ReadFull(conn, got); err != nil {
				t.Fatal(err)
			}
			if string(got) != greeting+sent {
				t.Fatal("what came back is not what was sent")
			}
		})
	}
}

func TestDialSaysWhyNot(t *testing.T) {
	for name, c := range map[string]struct {
		handle func(*testing.T, http.ResponseWriter, *http.Request)
		want   []string
	}{
		"the program fails": {
			func(t *testing.T, w http.ResponseWriter, r *http.Request) {
				execProgram{silent: true, code: 1}.overWebSocket(t, w, r)
			},
			[]string{"pod castellan-system/server-0", "castellan-server ended with code 1", "the socket does not answer"},
		},
		"the program says nothing": {
			func(t *testing.T, w http.ResponseWriter, r *http.Request) {
				execProgram{silent: true}.overWebSocket(t, w, r)
			},
			[]string{"castellan-server ended: "},
		},
		"may not": {
			func(_ *testing.T, w http.ResponseWriter, _ *http.Request) {
				refuse(w, http.StatusForbidden, metav1.StatusReasonForbidden, `pods "server-0" is forbidden: User "op" cannot create resource "pods/exec"`)
			},
			[]string{`User "op" cannot create resource "pods/exec"`, "this needs the verb create on pods/exec in namespace castellan-system"},
		},
		"no such pod": {
			func(_ *testing.T, w http.ResponseWriter, _ *http.Request) {
				refuse(w, http.StatusNotFound, metav1.StatusReasonNotFound, `pods "server-0" not found`)
			},
			[]string{`pods "server-0" not found`, "try again"},
		},
		"the kubelet is away": {
			func(_ *testing.T, w http.ResponseWriter, _ *http.Request) {
				refuse(w, http.StatusInternalServerError, metav1.StatusReasonInternalError, "dial tcp 10.0.0.1:10250: connect: connection refused")
			},
			[]string{"connection refused", "does the API server reach the node's kubelet?"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			conn, err := dial(t, apiServer(t, c.handle))
			if err == nil {
				conn.Close()
				t.Fatal("connected")
			}
			for _, want := range c.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%q is not in: %v", want, err)
				}
			}
			if len(err.Error()) > 4096 {
				t.Errorf("an error of %d bytes", len(err.Error()))
			}
		})
	}
}

func TestDialGivesUp(t *testing.T) {
	gone := make(chan struct{})
	client := apiServer(t, func(*testing.T, http.ResponseWriter, *http.Request) { <-gone })
	t.Cleanup(func() { close(gone) })
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(50*time.Millisecond, cancel)
	_, err := client.Dial(ctx, kube.Exec{Namespace: "castellan-system", Pod: "server-0", Command: []string{"castellan-server", "admin-stdio"}})
	if err == nil || !strings.Contains(err.Error(), "has not answered") {
		t.Fatalf("got %v", err)
	}
}
