package kube_test

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	dynamicfake "k8s.io/client-go/dynamic/fake"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"castellan.dev/internal/kube"
)

// patience is ten times what anything here may take.
const patience = 20 * time.Second

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("%s: it did not happen", what)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// background runs parts until the test ends, and waits for them.
func background(t *testing.T, parts ...func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	for _, part := range parts {
		running.Go(func() {
			if err := part(ctx); err != nil && !errors.Is(err, context.Canceled) {
				t.Errorf("part ended: %v", err)
			}
		})
	}
	t.Cleanup(func() { cancel(); running.Wait() })
}

// watchCount counts the watches that a fake has opened. Between its list and its
// watch a fake loses what happens, so that tests change nothing before.
func watchCount(f interface {
	PrependWatchReactor(resource string, reaction clienttesting.WatchReactionFunc)
}, tracker clienttesting.ObjectTracker) *atomic.Int32 {
	opened := &atomic.Int32{}
	f.PrependWatchReactor("*", func(a clienttesting.Action) (bool, watch.Interface, error) {
		w, err := tracker.Watch(a.GetResource(), a.GetNamespace())
		if err == nil {
			opened.Add(1)
		}
		return err == nil, w, err
	})
	return opened
}

// kindsWatched are the built-in kinds that informers follow.
const kindsWatched = 5

func fullPod() *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "orders-1", Namespace: "shop", UID: "uid-1", ResourceVersion: "7",
			Labels: map[string]string{"app": "orders"}, Annotations: map[string]string{"large": "thing"},
			ManagedFields: []metav1.ManagedFieldsEntry{{Manager: "kubectl"}}},
		Spec: corev1.PodSpec{NodeName: "node-1", ServiceAccountName: "orders",
			Containers: []corev1.Container{{Name: "app", Image: "image", Env: []corev1.EnvVar{{Name: "SECRET", Value: "x"}},
				Ports: []corev1.ContainerPort{{Name: "http", ContainerPort: 8080, Protocol: corev1.ProtocolTCP}}}},
			Volumes: []corev1.Volume{{Name: "other"}, {Name: "identity", VolumeSource: corev1.VolumeSource{CSI: &corev1.CSIVolumeSource{Driver: "csi.castellan.dev"}}}}},
		Status: corev1.PodStatus{Phase: corev1.PodRunning, PodIP: "10.0.0.1", PodIPs: []corev1.PodIP{{IP: "10.0.0.1"}, {IP: "fd00::1"}},
			Conditions:        []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}, {Type: corev1.PodScheduled}},
			ContainerStatuses: []corev1.ContainerStatus{{Name: "app"}}},
	}
}

func TestInformersKeepWhatIsUsed(t *testing.T) {
	client := fake.NewClientset(fullPod(),
		&corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "orders", Namespace: "shop", UID: "sa-1"}},
		&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop", Labels: map[string]string{"istio-injection": "enabled"}}})
	i, err := kube.NewInformers(kube.InformersConfig{Kubernetes: client, Dynamic: dynamicfake.NewSimpleDynamicClient(runtime.NewScheme())})
	if err != nil {
		t.Fatal(err)
	}
	opened := watchCount(client, client.Tracker())
	if i.Synced() || !i.LastContact().IsZero() || i.Ready() == nil {
		t.Error("something is known before Run")
	}
	began := time.Now()
	background(t, i.Run)
	eventually(t, "sync", func() bool { return i.Synced() && opened.Load() == kindsWatched })
	if i.LastContact().Before(began) || i.Ready() != nil {
		t.Errorf("last contact %v, ready %v", i.LastContact(), i.Ready())
	}
	for index, key := range map[string]string{kube.IndexUID: "uid-1", kube.IndexNode: "node-1"} {
		found, err := i.Pods().ByIndex(index, key)
		if err != nil || len(found) != 1 {
			t.Fatalf("index %s: %v, %v", index, found, err)
		}
	}
	found, _ := i.Pods().ByIndex(kube.IndexUID, "uid-1")
	p, ok := found[0].(*corev1.Pod)
	if !ok || p.Name != "orders-1" || p.Labels["app"] != "orders" || p.Spec.NodeName != "node-1" || p.Spec.ServiceAccountName != "orders" ||
		p.Spec.Containers[0].Ports[0].ContainerPort != 8080 || len(p.Spec.Volumes) != 1 || p.Status.PodIPs[1].IP != "fd00::1" ||
		len(p.Status.Conditions) != 1 || p.ResourceVersion == "" {
		t.Errorf("lost something: %+v", found[0])
	}
	if p.ManagedFields != nil || p.Annotations != nil || p.Spec.Containers[0].Env != nil || p.Spec.Containers[0].Image != "" || p.Status.ContainerStatuses != nil {
		t.Errorf("kept what nobody uses: %+v", p)
	}
	if found, err := i.ServiceAccounts().ByIndex(kube.IndexUID, "sa-1"); err != nil || len(found) != 1 {
		t.Errorf("service account: %v, %v", found, err)
	}
	if labels, ok := i.Labels("shop"); !ok || labels["istio-injection"] != "enabled" {
		t.Errorf("namespace labels %v, %v", labels, ok)
	}
	if _, ok := i.Labels("other"); ok {
		t.Error("a namespace that is not there has labels")
	}
	// Changes arrive, deletions too.
	if err := client.CoreV1().Pods("shop").Delete(t.Context(), "orders-1", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "deletion", func() bool { return len(i.Pods().ListKeys()) == 0 })
}

func TestInformersSurviveRefusals(t *testing.T) {
	client := fake.NewClientset(fullPod())
	var mu sync.Mutex
	refuse := true
	client.PrependReactor("list", "pods", func(clienttesting.Action) (bool, runtime.Object, error) {
		mu.Lock()
		defer mu.Unlock()
		if refuse {
			return true, nil, errors.New("forbidden")
		}
		return false, nil, nil
	})
	i, err := kube.NewInformers(kube.InformersConfig{Kubernetes: client, Dynamic: dynamicfake.NewSimpleDynamicClient(runtime.NewScheme())})
	if err != nil {
		t.Fatal(err)
	}
	background(t, i.Run)
	eventually(t, "the refusal's name", func() bool {
		err := i.Ready()
		return err != nil && err.Error() == `kubernetes: pods cannot be listed: forbidden`
	})
	if i.Synced() {
		t.Error("synced without pods")
	}
	mu.Lock()
	refuse = false
	mu.Unlock()
	eventually(t, "sync", i.Synced)
}
