package cli_test

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"google.golang.org/grpc"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	castellanv1 "castellan.dev/api/castellan/v1"
)

// fakeCluster is an API server as far as the command asks one, with the admin
// sockets of a server and of agents behind pods/exec.
type fakeCluster struct {
	t          *testing.T
	url        string
	kubeconfig string

	mu sync.Mutex
	// objects are answers by path and query: a JSON value each.
	objects map[string]any
	// forbidden paths are answered with 403.
	forbidden map[string]bool
	// admins are what answers in a pod, by its name.
	admins map[string]*grpc.Server
	// asked is every command that was run, with its pod.
	asked []string

	// pods of the shop.
	pods []corev1.Pod
}

const castellanPods = "/api/v1/namespaces/castellan-system/pods"

func newCluster(t *testing.T) *fakeCluster {
	t.Helper()
	c := &fakeCluster{t: t, objects: map[string]any{}, forbidden: map[string]bool{}, admins: map[string]*grpc.Server{}}
	s := httptest.NewServer(c)
	t.Cleanup(s.Close)
	c.url = s.URL
	c.kubeconfig = writeFile(t, "kubeconfig", []byte(fmt.Sprintf(`
apiVersion: v1
kind: Config
current-context: test
clusters: [{name: test, cluster: {server: %q}}]
users: [{name: test, user: {}}]
contexts: [{name: test, context: {cluster: test, user: test, namespace: shop}}, {name: elsewhere, context: {cluster: test, user: test}}]
`, s.URL)))
	return c
}

// run runs the command against the cluster.
func (c *fakeCluster) run(args ...string) result {
	c.t.Helper()
	c.t.Setenv("KUBECONFIG", c.kubeconfig)
	c.t.Chdir(c.t.TempDir()) // no .castellan here
	return castellanRun(c.t, args...)
}

func (c *fakeCluster) set(path string, object any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.objects[path] = object
}

func (c *fakeCluster) forbid(path string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.forbidden[path] = true
}

// admin puts a gRPC server into a pod of one of our parts.
func (c *fakeCluster) admin(app, pod, node string, register func(*grpc.Server)) {
	s := grpc.NewServer()
	register(s)
	c.t.Cleanup(s.Stop)
	c.mu.Lock()
	c.admins[pod] = s
	c.mu.Unlock()
	query := castellanPods + "?"
	if app == "castellan-agent" {
		query += "fieldSelector=spec.nodeName%3D" + node + "&"
	}
	p := runningPod("castellan-system", pod, app, node)
	p.Spec.Containers = []corev1.Container{{Name: app}}
	c.set(query+"labelSelector=app%3D"+app, corev1.PodList{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "PodList"}, Items: []corev1.Pod{p}})
}

// stop ends what answers in a pod.
func (c *fakeCluster) stop(pod string) {
	c.mu.Lock()
	s := c.admins[pod]
	delete(c.admins, pod)
	c.mu.Unlock()
	s.Stop()
}

// server puts Castellan's server there.
func (c *fakeCluster) server(policies *castellanv1.PoliciesResponse) *policyStatus {
	p := &policyStatus{answer: policies}
	c.admin("castellan-server", "castellan-server-0", "node-1", func(s *grpc.Server) {
		castellanv1.RegisterDiscoveryAdminServer(s, p)
		castellanv1.RegisterAuthorityAdminServer(s, &longLedger{rows: 3})
	})
	return p
}

func runningPod(namespace, name, account, node string) corev1.Pod {
	return corev1.Pod{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, UID: types.UID("uid-" + name)},
		Spec:       corev1.PodSpec{NodeName: node, ServiceAccountName: account},
		Status:     corev1.PodStatus{Phase: corev1.PodRunning, Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}},
	}
}

// ServeHTTP answers as an API server.
func (c *fakeCluster) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if strings.HasSuffix(r.URL.Path, "/exec") {
		c.exec(w, r)
		return
	}
	c.mu.Lock()
	key := r.URL.Path
	if q := r.URL.Query(); len(q) > 0 {
		for _, name := range []string{"limit", "resourceVersion", "resourceVersionMatch", "timeout", "continue"} {
			q.Del(name)
		}
		if len(q) > 0 {
			key += "?" + q.Encode()
		}
	}
	object, ok := c.objects[key]
	forbidden := c.forbidden[r.URL.Path]
	c.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	switch {
	case forbidden:
		c.refuse(w, http.StatusForbidden, metav1.StatusReasonForbidden, r.URL.Path+` is forbidden: User "op" cannot do that`)
	case !ok:
		c.refuse(w, http.StatusNotFound, metav1.StatusReasonNotFound, key+" not found")
	default:
		_ = json.NewEncoder(w).Encode(object)
	}
}

func (c *fakeCluster) refuse(w http.ResponseWriter, code int, reason metav1.StatusReason, message string) {
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(metav1.Status{
		TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: metav1.StatusFailure, Reason: reason, Code: int32(code), Message: message,
	})
}

// exec runs the admin-stdio of a pod: its gRPC server over the connection.
func (c *fakeCluster) exec(w http.ResponseWriter, r *http.Request) {
	pod := strings.Split(strings.TrimPrefix(r.URL.Path, castellanPods+"/"), "/")[0]
	c.mu.Lock()
	s, forbidden := c.admins[pod], c.forbidden[r.URL.Path]
	c.asked = append(c.asked, pod+": "+strings.Join(r.URL.Query()["command"], " "))
	c.mu.Unlock()
	if s == nil || forbidden {
		w.Header().Set("Content-Type", "application/json")
		c.refuse(w, http.StatusForbidden, metav1.StatusReasonForbidden, `pods "`+pod+`" is forbidden: User "op" cannot create resource "pods/exec"`)
		return
	}
	conn, err := (&websocket.Upgrader{Subprotocols: []string{"v5.channel.k8s.io"}}).Upgrade(w, r, nil)
	if err != nil {
		c.t.Error(err)
		return
	}
	defer conn.Close()
	near, far := net.Pipe()
	defer near.Close()
	go func() { _ = s.Serve(&oneConn{conn: far}) }()
	go func() {
		defer near.Close()
		for {
			_, m, err := conn.ReadMessage()
			if err != nil || len(m) == 2 && m[0] == 255 {
				return
			}
			if _, err := near.Write(m[1:]); err != nil {
				return
			}
		}
	}()
	buf := make([]byte, 32<<10)
	for {
		n, err := near.Read(buf)
		if n > 0 && conn.WriteMessage(websocket.BinaryMessage, append([]byte{1}, buf[:n]...)) != nil || err != nil {
			break
		}
	}
	_ = conn.WriteMessage(websocket.BinaryMessage, append([]byte{3}, `{"status":"Success"}`...))
	_ = conn.WriteControl(websocket.CloseMessage, websocket.FormatCloseMessage(websocket.CloseNormalClosure, ""), time.Now().Add(time.Second))
}

// oneConn is a listener of one connection.
type oneConn struct {
	mu   sync.Mutex
	conn net.Conn
}

func (l *oneConn) Accept() (net.Conn, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.conn == nil {
		return nil, io.EOF
	}
	c := l.conn
	l.conn = nil
	return c, nil
}
func (l *oneConn) Close() error   { return nil }
func (l *oneConn) Addr() net.Addr { return &net.UnixAddr{Name: "pod"} }

func TestCAOnCluster(t *testing.T) {
	c := newCluster(t)
	c.server(&castellanv1.PoliciesResponse{})
	r := c.run("ca", "issued").want(t, 0, "CREATED", "spiffe://cluster.local/ns/shop/sa/orders-2")
	if r.err != "" {
		t.Errorf("%s", r.err)
	}
	if want := "castellan-server-0: /usr/bin/castellan-server admin-stdio -config /etc/castellan/server.yaml"; len(c.asked) != 1 || c.asked[0] != want {
		t.Errorf("ran %q, want %q", c.asked, want)
	}
	c.run("ca", "issued", "--castellan-namespace", "elsewhere").want(t, 1, "elsewhere")
	c.run("ca", "issued", "--up", "up.json", "--context", "test").want(t, 3, "--up is for a mesh on this machine")
	c.run("ca", "issued", "--context", "other").want(t, 3, `context "other" does not exist`)
	c.forbid(castellanPods + "/castellan-server-0/exec")
	c.run("ca", "issued").want(t, 1, `cannot create resource "pods/exec"`, "this needs the verb create on pods/exec in namespace castellan-system")
	c.forbid(castellanPods)
	c.run("ca", "status").want(t, 1, "this needs the verb list on pods in namespace castellan-system")
}

func TestCompletePods(t *testing.T) {
	c := newCluster(t)
	c.shop()
	for _, args := range [][]string{{"cert", "inspect", "pod/ord"}, {"cert", "fetch", "-n", "shop", "pod/ord"}, {"authz", "check", "ord"}, {"proxy", "status", "ord"}} {
		r := c.run(append([]string{"__complete"}, args...)...).want(t, 0, "orders-1\n", "orders-2\n")
		if strings.Contains(r.out, "legacy") {
			t.Errorf("%q: %s", args, r.out)
		}
	}
	c.forbid("/api/v1/namespaces/shop/pods")
	if r := c.run("__complete", "authz", "check", "ord").want(t, 0); strings.Contains(r.out, "forbidden") {
		t.Errorf("%s", r.out)
	}
}

// Which mesh is meant: flags decide, then what is here, then kubectl's cluster.
func TestTarget(t *testing.T) {
	c := newCluster(t)
	c.server(&castellanv1.PoliciesResponse{})
	local := ledgerMesh(t, &longLedger{rows: 1})
	onCluster := "orders-2"
	t.Setenv("KUBECONFIG", c.kubeconfig)
	t.Chdir(filepath.Dir(filepath.Dir(local)))
	ask := func(args ...string) string {
		t.Helper()
		return castellanRun(t, append([]string{"ca", "issued"}, args...)...).want(t, 0).out
	}
	if !strings.Contains(ask(), onCluster) {
		t.Error("no .castellan here: want the cluster")
	}
	if strings.Contains(ask("--up", local), onCluster) {
		t.Error("--up: want the mesh of this machine")
	}
	t.Chdir(t.TempDir())
	for name, data := range map[string]string{".castellan/up.json": readFile(t, local)} {
		mustWrite(t, name, data)
	}
	if strings.Contains(ask(), onCluster) {
		t.Error(".castellan here: want it")
	}
	for _, flag := range [][]string{{"--context", "test"}, {"-n", "shop"}, {"--kubeconfig", c.kubeconfig}, {"--castellan-namespace", "castellan-system"}} {
		if !strings.Contains(ask(flag...), onCluster) {
			t.Errorf("%q: want the cluster", flag)
		}
	}
	t.Setenv("KUBECONFIG", filepath.Join(t.TempDir(), "none"))
	t.Setenv("HOME", t.TempDir())
	castellanRun(t, "ca", "issued", "-n", "shop").want(t, 1, "no cluster is configured: set KUBECONFIG, or give --kubeconfig")
	t.Chdir(t.TempDir())
	castellanRun(t, "ca", "issued").want(t, 1, "no mesh is running by .castellan/up.json", "for one on Kubernetes set KUBECONFIG, or give --kubeconfig")
}
