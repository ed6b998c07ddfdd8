package install_test

import (
	"context"
	"io"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/rest"
	clienttesting "k8s.io/client-go/testing"

	"castellan.dev/internal/install"
)

// answer is what a pod says through the API server.
type answer string

func (a answer) DoRaw(context.Context) ([]byte, error) { return []byte(a), context.DeadlineExceeded }

func (a answer) Stream(context.Context) (io.ReadCloser, error) { return nil, io.EOF }

// Who waits for a server that does not come up is told why.
func TestWhyNot(t *testing.T) {
	unready := func(p *corev1.Pod) {
		p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionFalse}}
		p.Status.ContainerStatuses[0].Ready = false
		p.Spec.Containers[0].Ports = []corev1.ContainerPort{{Name: "http", ContainerPort: 15014}}
	}
	server := func(change func(*corev1.Pod)) *corev1.Pod {
		return pod(namespace, "server-1", "castellan-server", "node-1", "castellan-server:dev", unready, change)
	}
	tests := map[string]struct {
		pod    *corev1.Pod
		event  *corev1.Event
		readyz string
		want   string
	}{
		"crash": {pod: server(func(p *corev1.Pod) {
			p.Status.ContainerStatuses[0].RestartCount = 3
			p.Status.ContainerStatuses[0].LastTerminationState.Terminated = &corev1.ContainerStateTerminated{ExitCode: 1, Reason: "Error", Message: "{\"msg\":\"made a root\"}\ncastellan-server: dataDir: no space left\n"}
		}), want: "0 of 1 ready (pod server-1 on node-1: castellan-server ended with code 1 after 3 starts: Error: castellan-server: dataDir: no space left)"},
		"image": {pod: server(func(p *corev1.Pod) {
			p.Status.ContainerStatuses[0].State.Waiting = &corev1.ContainerStateWaiting{Reason: "ErrImageNeverPull", Message: "not present"}
		}), want: "ErrImageNeverPull: not present"},
		"nowhere": {pod: server(func(p *corev1.Pod) {
			p.Spec.NodeName = ""
			p.Status.Phase = corev1.PodPending
			p.Status.Conditions = append(p.Status.Conditions, corev1.PodCondition{Type: corev1.PodScheduled, Status: corev1.ConditionFalse, Reason: "Unschedulable", Message: "0/2 nodes are\navailable"})
		}), want: "(pod server-1: Unschedulable: 0/2 nodes are available)"},
		"not ready": {pod: server(func(*corev1.Pod) {}), readyz: "[+] ledger ok\n[-] tokenIssuers: no keys yet\n[!] other: x\n[-] webhook: no listener\n",
			want: "tokenIssuers: no keys yet; webhook: no listener"},
		"volume": {pod: server(func(p *corev1.Pod) {
			p.Status.Phase = corev1.PodPending
			p.Status.ContainerStatuses[0].State.Waiting = &corev1.ContainerStateWaiting{Reason: "ContainerCreating"}
		}), event: &corev1.Event{
			ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "e"}, Type: corev1.EventTypeWarning, Reason: "FailedMount", Message: "no such key",
		}, want: "FailedMount: no such key"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			objects := []runtime.Object{tt.pod}
			if tt.event != nil {
				objects = append(objects, tt.event)
			}
			c := newCluster(t, objects...)
			c.typed.PrependProxyReactor("pods", func(action clienttesting.Action) (bool, rest.ResponseWrapper, error) {
				if a := action.(clienttesting.ProxyGetAction); a.GetPort() != "15014" || a.GetPath() != "readyz" {
					t.Errorf("%+v", a)
				}
				return true, answer(tt.readyz), nil
			})
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			in, err := install.New(install.Config{Dynamic: c.dynamic, Kubernetes: c.typed, Poll: time.Millisecond, Progress: func(line string) {
				if strings.Contains(line, "castellan-server: 0 of 1 ready") {
					cancel()
				}
			}})
			if err != nil {
				t.Fatal(err)
			}
			if err := in.Install(ctx, render(t, ""), true); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, want %q", err, tt.want)
			}
		})
	}
}

// What others installed of the kinds of policy is used as it is.
func TestForeignDefinitions(t *testing.T) {
	fields := map[string]any{"status": map[string]any{"conditions": []any{map[string]any{"type": "Established", "status": "True"}}}}
	c := newCluster(t, object("apiextensions.k8s.io/v1", "CustomResourceDefinition", "", "peerauthentications.security.istio.io", fields))
	mustInstall(t, c, "")
	for _, w := range c.writes() {
		if w == "patch customresourcedefinitions peerauthentications.security.istio.io" {
			t.Error("somebody else's definition was changed")
		}
	}
	position(t, c.writes(), "patch customresourcedefinitions authorizationpolicies.security.istio.io")
	if !strings.Contains(c.heard(), "using the peerauthentications.security.istio.io that is installed already") {
		t.Error(c.heard())
	}
	// And it is not ours to remove.
	if err := c.installer(t).Uninstall(t.Context(), true); err != nil {
		t.Fatal(err)
	}
	if c.get(t, "apiextensions.k8s.io", "customresourcedefinitions", "", "peerauthentications.security.istio.io") == nil {
		t.Error("somebody else's definition was removed")
	}
	if c.get(t, "apiextensions.k8s.io", "customresourcedefinitions", "", "authorizationpolicies.security.istio.io") != nil {
		t.Error("our own definition is still there")
	}
}
