package kube

import (
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// declaring is an annotation of n identities.
func declaring(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "cluster.local/ns/x/sa/a%d,", i)
	}
	return b.String()
}

func annotated(s *corev1.Service, text string) *corev1.Service {
	s.Annotations = map[string]string{annotationAccounts: text}
	return s
}

// aged was made so many minutes after the others.
func aged(s *corev1.Service, minutes int) *corev1.Service {
	s.CreationTimestamp = metav1.NewTime(time.Unix(1_800_000_000, 0).Add(time.Duration(minutes) * time.Minute))
	return s
}

// TestDeclaredIdentities: every proxy of the mesh holds what a service declares, so
// that it may not declare more than it can need. One that does accepts nobody by it,
// and is still not spoken to in the clear.
func TestDeclaredIdentities(t *testing.T) {
	tests := map[string]struct {
		text string
		want int
		log  string
	}{
		"as many as allowed":       {declaring(64), 64, ""},
		"each of them many times":  {strings.Repeat(declaring(3), 200), 3, ""},
		"one more":                 {declaring(65), 0, "65 identities, 64 are allowed; none of them is taken"},
		"a quarter of a megabyte":  {declaring(11_000), 0, "more than 32768 bytes; nothing of it is taken"},
		"a bad one among the good": {declaring(2) + "https://x", 2, "is no SPIFFE ID and is left out"},
		"a long bad one":           {strings.Repeat("x", 30_000), 0, "is no SPIFFE ID and is left out"},
		"none":                     {"", 0, ""},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newByHand(t)
			h.put(annotated(serviceNo("shop", 0, nil), tt.text), sliceNo("shop", 0, 1, 1))
			h.run()
			s := h.service("shop/s0")
			if len(s.SubjectAltNames) != tt.want || s.Accounts == nil || len(s.Accounts) != 0 || len(s.Endpoints) != 1 || s.Endpoints[0].OutsideMesh {
				t.Errorf("declared %d, accounts %#v, endpoints %+v", len(s.SubjectAltNames), s.Accounts, s.Endpoints)
			}
			if log := h.log.String(); tt.log == "" && log != "" || !strings.Contains(log, tt.log) || len(log) > 1000 {
				t.Errorf("log of %d bytes: %.1000s", len(log), log)
			}
			kept, _, _ := h.in.services.GetByKey("shop/s0")
			if n := len(kept.(*corev1.Service).Annotations[annotationAccounts]); n > 33_000 {
				t.Errorf("%d bytes are kept", n)
			}
		})
	}
}

// TestIdentitiesOfANamespace: many services do not get around the bound of one; the
// oldest count, and other namespaces keep what they have.
func TestIdentitiesOfANamespace(t *testing.T) {
	h := newByHand(t)
	h.put(annotated(serviceNo("shop", 0, nil), declaring(64)), sliceNo("shop", 0, 1, 1))
	const all = 315 // of which 312 times 64 are within 20,000
	for i := range all {
		h.put(annotated(aged(serviceNo("evil", i, nil), all-i), declaring(64)), sliceNo("evil", i, 1, 1))
	}
	h.run()
	count := func() (whole, ids int) {
		for _, s := range h.inv.services {
			if s.object != nil && s.object.Namespace == "evil" {
				ids += len(s.made.SubjectAltNames)
				if len(s.made.Endpoints) > 0 {
					whole++
				}
			}
		}
		return whole, ids
	}
	if whole, ids := count(); whole != 312 || ids != 312*64 {
		t.Errorf("%d services are whole, and declare %d identities", whole, ids)
	}
	for key, whole := range map[string]bool{"shop/s0": true, "evil/s314": true, "evil/s0": false, "evil/s2": false, "evil/s3": true} {
		s := h.service(key)
		if (len(s.Endpoints) > 0) != whole || (len(s.SubjectAltNames) > 0) != whole || s.Accounts == nil {
			t.Errorf("%s: %+v", key, s)
		}
	}
	if log := h.log.String(); strings.Count(log, "level=WARN") != 1 || !strings.Contains(log, "20000 identities, are allowed in a namespace") {
		t.Errorf("log: %s", log)
	}
	revision := h.service("evil/s2").Revision
	h.put(serviceNo("evil", 314, nil)) // declares nothing any more
	h.run()
	if s := h.service("evil/s2"); len(s.Endpoints) != 1 || len(s.SubjectAltNames) != 64 || s.Revision == revision {
		t.Errorf("within the share again: %+v", s)
	}
}

// wide is a service of a thousand ports, the first of them named.
func wide(i int) *corev1.Service {
	s := serviceNo("evil", i, map[string]string{"app": "orders"})
	s.Spec.Ports = nil
	for p := range maxServicePorts {
		s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{Name: fmt.Sprint("http-", p), Port: int32(1000 + p), TargetPort: intstr.FromInt32(int32(1000 + maxServicePorts*i + p))})
	}
	return s
}

// TestPortsOfANamespace: services beyond their namespace's share are as if they were
// not there: the newest, and no other namespace's.
func TestPortsOfANamespace(t *testing.T) {
	h := newByHand(t)
	h.put(serviceNo("shop", 0, nil), meshPodNo("evil", 0, nil))
	for i := range 11 {
		h.put(aged(wide(i), -i))
	}
	declared := func() (first, last uint16, n int) {
		ports := h.inv.pods.byUID["evilp0"].Ports
		return ports[0].Number, ports[len(ports)-1].Number, len(ports)
	}
	h.run()
	if h.service("evil/s0") != nil || h.service("evil/s1") == nil || h.service("evil/s10") == nil || h.service("shop/s0") == nil {
		t.Error("another than the newest is left out")
	}
	if !strings.Contains(h.log.String(), `is not known to the mesh: the services of a namespace may have 10000 ports between them`) {
		t.Errorf("log: %s", h.log)
	}
	// What all ten say of one pod is bounded too, and the eleventh says nothing.
	if first, last, n := declared(); first != 2000 || last != 3999 || n != 2000 {
		t.Errorf("%d ports are declared, from %d to %d", n, first, last)
	}
	if err := h.in.services.Delete(wide(10)); err != nil {
		t.Fatal(err)
	}
	h.run()
	if h.service("evil/s0") == nil || h.inv.services["evil/s10"] != nil {
		t.Error("the newest is still left out")
	}
	if first, _, _ := declared(); first != 1000 {
		t.Errorf("ports from %d are declared", first)
	}
}

// TestManyAccounts: nobody answers for a service whose pods are of more accounts than
// a service can need, until they are fewer.
func TestManyAccounts(t *testing.T) {
	h := newByHand(t)
	h.put(serviceNo("shop", 0, map[string]string{"app": "orders"}))
	pod := func(i int) *corev1.Pod {
		p := meshPodNo("shop", i, nil)
		p.Spec.ServiceAccountName = fmt.Sprint("a", i)
		return p
	}
	for i := range maxAccounts {
		h.put(pod(i))
	}
	check := func(want int) {
		t.Helper()
		h.run()
		if s := h.service("shop/s0"); s.Accounts == nil || len(s.Accounts) != want {
			t.Errorf("%d accounts, want %d", len(s.Accounts), want)
		}
	}
	check(maxAccounts)
	h.put(pod(maxAccounts))
	check(0)
	if !strings.Contains(h.log.String(), "more than 250 accounts; none of them may answer for it") {
		t.Errorf("log: %s", h.log)
	}
	h.put(pod(maxAccounts + 1))
	check(0)
	for _, i := range []int{7, 8} {
		if err := h.in.pods.Delete(pod(i)); err != nil {
			t.Fatal(err)
		}
	}
	check(maxAccounts)
}

// TestComplaints: who writes something else that is wrong a thousand times fills
// nobody's log, and does not keep what is wrong elsewhere out of it.
func TestComplaints(t *testing.T) {
	h := newByHand(t)
	for i := range 1000 {
		h.put(annotated(serviceNo("evil", 0, nil), fmt.Sprint("https://x", i, strings.Repeat("y", 1000))))
		h.run()
	}
	if log := h.log.String(); strings.Count(log, "level=WARN") != complaintBurst || len(log) > complaintBurst*600 {
		t.Errorf("%d lines, %d bytes", strings.Count(log, "level=WARN"), len(log))
	}
	h.put(annotated(serviceNo("shop", 0, nil), "https://z"))
	h.run()
	if !strings.Contains(h.log.String(), "https://z") {
		t.Error("another namespace's is not said")
	}
	// What could not be said is when there is room.
	later := h.inv.now().Add(time.Hour)
	h.inv.now = func() time.Time { return later }
	h.put(annotated(serviceNo("evil", 0, nil), "https://last"))
	h.run()
	if log := h.log.String(); !strings.Contains(log, "https://last") || !strings.Contains(log, "unsaid=980") {
		t.Errorf("log: %s", log[max(0, len(log)-500):])
	}
}
