package kube_test

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"castellan.dev/internal/kube"
)

type podOption func(*corev1.Pod)

// componentPod is a ready pod of one of our parts.
func componentPod(name, node string, options ...podOption) corev1.Pod {
	p := corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "castellan-system", Name: name},
		Spec:       corev1.PodSpec{NodeName: node, Containers: []corev1.Container{{Name: "sidecar"}, {Name: "castellan-agent"}}},
		Status: corev1.PodStatus{
			Phase:             corev1.PodRunning,
			Conditions:        []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}},
			ContainerStatuses: []corev1.ContainerStatus{{Name: "castellan-agent", State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{}}}},
		},
	}
	for _, o := range options {
		o(&p)
	}
	return p
}

func unready(p *corev1.Pod) { p.Status.Conditions[0].Status = corev1.ConditionFalse }

func terminating(p *corev1.Pod) { p.DeletionTimestamp = &metav1.Time{Time: time.Now()} }

func crashing(p *corev1.Pod) {
	unready(p)
	p.Status.ContainerStatuses[0].State = corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "CrashLoopBackOff"}}
}

// clusterOf answers with pods, and runs programs in them; asked gets each one's pod.
func clusterOf(t *testing.T, asked *string, pods ...corev1.Pod) *kube.Client {
	t.Helper()
	const path = "/api/v1/namespaces/castellan-system/pods"
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != path {
			*asked = strings.TrimPrefix(r.URL.Path, path+"/") + " " + r.URL.Query().Get("container") + " " + strings.Join(r.URL.Query()["command"], " ")
			execProgram{}.overWebSocket(t, w, r)
			return
		}
		if got := r.URL.Query().Get("labelSelector"); got != "app=castellan-agent" {
			t.Errorf("labelSelector %q", got)
		}
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(corev1.PodList{TypeMeta: metav1.TypeMeta{Kind: "PodList", APIVersion: "v1"}, Items: pods})
	}))
	t.Cleanup(s.Close)
	client, err := kube.New(&rest.Config{Host: s.URL}, "castellan-system")
	if err != nil {
		t.Fatal(err)
	}
	return client
}

func TestDialAgent(t *testing.T) {
	for name, c := range map[string]struct {
		pods []corev1.Pod
		want string // pod
		err  string
	}{
		"that of the node":                   {pods: []corev1.Pod{componentPod("a", "node-1"), componentPod("b", "node-2")}, want: "b"},
		"a ready one before one that is not": {pods: []corev1.Pod{componentPod("a", "node-2", unready), componentPod("b", "node-2")}, want: "b"},
		"one that only runs":                 {pods: []corev1.Pod{componentPod("a", "node-2", unready)}, want: "a"},
		"not one that ends":                  {pods: []corev1.Pod{componentPod("a", "node-2", terminating), componentPod("b", "node-2", unready)}, want: "b"},
		"none on the node":                   {pods: []corev1.Pod{componentPod("a", "node-1")}, err: "there is no pod of castellan-agent (label app=castellan-agent) on node node-2 in namespace castellan-system"},
		"none that runs":                     {pods: []corev1.Pod{componentPod("a", "node-2", crashing)}, err: "pod castellan-system/a of castellan-agent is not running: castellan-agent: CrashLoopBackOff"},
	} {
		t.Run(name, func(t *testing.T) {
			var asked string
			conn, err := clusterOf(t, &asked, c.pods...).DialAgent(t.Context(), "node-2")
			if c.err != "" {
				if err == nil || !strings.Contains(err.Error(), c.err) {
					t.Fatalf("got %v, want %q", err, c.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			conn.Close()
			want := c.want + "/exec castellan-agent /usr/bin/castellan-agent admin-stdio -config /etc/castellan/agent.yaml"
			if asked != want {
				t.Errorf("asked for %q, want %q", asked, want)
			}
		})
	}
}
