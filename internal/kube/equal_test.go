package kube_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	dynamicfake "k8s.io/client-go/dynamic/fake"

	"castellan.dev/internal/kube"
	"castellan.dev/internal/workloads"
)

// TestChangesEqualAFreshReading: whatever has happened in whatever order, what was
// made of the changes is what a look at the whole cluster makes of it.
func TestChangesEqualAFreshReading(t *testing.T) {
	for _, seed := range []uint64{1, 2, 3, uint64(time.Now().UnixNano())} {
		t.Run(fmt.Sprint("seed=", seed), func(t *testing.T) {
			t.Parallel()
			s := newScene(t)
			client := kube.Wrap(s.client, dynamicfake.NewSimpleDynamicClient(runtime.NewScheme()), namespace)
			r := rand.New(rand.NewPCG(seed, seed))
			revisions := map[string]string{}
			for step := range 25 {
				for range 1 + r.IntN(12) {
					happen(t, s, r)
				}
				fresh, err := client.ReadInventory(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				want := describe(fresh)
				deadline := time.Now().Add(patience)
				for !slices.Equal(describe(s.inv.Current()), want) {
					if time.Now().After(deadline) {
						t.Fatalf("step %d: followed\n%s\nread anew\n%s", step, strings.Join(describe(s.inv.Current()), "\n"), strings.Join(want, "\n"))
					}
					time.Sleep(5 * time.Millisecond)
				}
				checkRevisions(t, s.inv.Current(), revisions)
			}
		})
	}
}

// checkRevisions: what has the revision of before is as it was before. Whoever
// follows the inventory relies on that.
func checkRevisions(t *testing.T, f *workloads.File, seen map[string]string) {
	t.Helper()
	for i, line := range describe(f) {
		var key string
		if i < len(f.Workloads) {
			key = fmt.Sprint("pod ", f.Workloads[i].PodUID, f.Workloads[i].Revision)
		} else {
			s := f.Services[i-len(f.Workloads)]
			key = fmt.Sprint("service ", s.Namespace, "/", s.Name, s.Revision)
		}
		if before, ok := seen[key]; ok && before != line {
			t.Fatalf("%s was\n%s\nand is\n%s", key, before, line)
		}
		seen[key] = line
	}
}

// happen changes, makes or removes one object of a small cluster.
func happen(t *testing.T, s *scene, r *rand.Rand) {
	t.Helper()
	ctx, core := t.Context(), s.client.CoreV1()
	ns := []string{"shop", "evil"}[r.IntN(2)]
	app := []string{"orders", "payments"}[r.IntN(2)]
	name := fmt.Sprint("n", r.IntN(4))
	address := fmt.Sprint("10.0.0.", r.IntN(5))
	var err error
	switch remove := r.IntN(4) == 0; r.IntN(3) {
	case 0:
		p := meshPod(ns, name, app, address, func(p *corev1.Pod) {
			// A name may come back as another pod, on another address, ended or not.
			p.UID = types.UID(fmt.Sprint(ns, name, r.IntN(2)))
			p.Spec.HostNetwork = r.IntN(6) == 0
			if r.IntN(4) == 0 {
				outside(p)
			}
			if r.IntN(8) == 0 {
				p.Status.Phase = corev1.PodSucceeded
			}
			if r.IntN(8) == 0 {
				p.Spec.ServiceAccountName = "No_Name"
			}
		})
		err = change(remove,
			func() error { return core.Pods(ns).Delete(ctx, name, metav1.DeleteOptions{}) },
			func() error { _, err := core.Pods(ns).Create(ctx, p, metav1.CreateOptions{}); return err },
			func() error { _, err := core.Pods(ns).Update(ctx, p, metav1.UpdateOptions{}); return err })
	case 1:
		service := svc(ns, name, []string{app, app, ""}[r.IntN(3)], func(s *corev1.Service) {
			s.Spec.Ports[0].TargetPort = []intstr.IntOrString{intstr.FromString("web"), intstr.FromInt32(9090), {}}[r.IntN(3)]
			s.Spec.Ports[0].Name = []string{"http", "tcp-x"}[r.IntN(2)]
			if r.IntN(5) == 0 {
				declares("spiffe://cluster.local/ns/a/sa/b")(s)
			}
			if r.IntN(8) == 0 {
				s.Spec.Type = corev1.ServiceTypeExternalName
			}
		})
		err = change(remove,
			func() error { return core.Services(ns).Delete(ctx, name, metav1.DeleteOptions{}) },
			func() error { _, err := core.Services(ns).Create(ctx, service, metav1.CreateOptions{}); return err },
			func() error { _, err := core.Services(ns).Update(ctx, service, metav1.UpdateOptions{}); return err })
	case 2:
		slice := sliceOf(ns, name, func(s *discoveryv1.EndpointSlice) {
			*s.Ports[0].Name = []string{"http", "tcp-x"}[r.IntN(2)]
			if r.IntN(3) == 0 {
				no := false
				s.Endpoints[0].Conditions.Ready = &no
			}
		}, endpoint{address, ""}, endpoint{fmt.Sprint("10.0.0.", r.IntN(5)), fmt.Sprint(ns, "n", r.IntN(4), r.IntN(2))})
		api := s.client.DiscoveryV1().EndpointSlices(ns)
		err = change(remove,
			func() error { return api.Delete(ctx, slice.Name, metav1.DeleteOptions{}) },
			func() error { _, err := api.Create(ctx, slice, metav1.CreateOptions{}); return err },
			func() error { _, err := api.Update(ctx, slice, metav1.UpdateOptions{}); return err })
	}
	if err != nil {
		t.Fatal(err)
	}
}

func change(gone bool, remove, create, update func() error) error {
	if gone {
		if err := remove(); !apierrors.IsNotFound(err) {
			return err
		}
		return nil
	}
	if err := create(); !apierrors.IsAlreadyExists(err) {
		return err
	}
	return update()
}
