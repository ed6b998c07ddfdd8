package kubernetes_test

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"castellan.dev/certs-test/kubernetes/apps/control"
)

// pod is one pod of the application, as a test asks for it.
type pod struct {
	// Name is also its label app, unless App is given.
	Name, App string
	// Node is where it runs; empty: anywhere.
	Node string
	// Account is its service account; empty: Name.
	Account             string
	Labels, Annotations map[string]string
	// Socket gives the application itself the identity's socket: by annotation where
	// the pod has a proxy, and by a volume of its own where Volume is set too.
	Socket, Volume bool
	// Change alters the pod's spec.
	Change func(spec object)
}

// app is a pod that runs.
type app struct {
	Namespace, Name, Node, UID, Account string
	IP, IP6                             string
}

// id is the SPIFFE ID that the pod must have.
func (a *app) id() string {
	return "spiffe://cluster.local/ns/" + a.Namespace + "/sa/" + a.Account
}

// controller reaches control ports: from the first node all pods are reached.
var controller = sync.OnceValue(func() *http.Client { return fromNode("node-1") })

func (p pod) object(ns string) object {
	labels := object{"app": p.App}
	if p.App == "" {
		labels["app"] = p.Name
	}
	for k, v := range p.Labels {
		labels[k] = v
	}
	annotations := object{"traffic.sidecar.istio.io/excludeInboundPorts": fmt.Sprint(control.Control)}
	for k, v := range p.Annotations {
		annotations[k] = v
	}
	container := object{
		"name": "app", "image": appImage, "imagePullPolicy": "Never",
		"env": []object{{"name": "POD_NAME", "value": p.Name}},
		"ports": []object{
			{"name": "http", "containerPort": control.HTTP},
			{"name": "grpc", "containerPort": control.GRPC},
			{"name": "tcp", "containerPort": control.TCP},
			{"name": "tcp-greeting", "containerPort": control.Greeting},
		},
		// A machine that is slow for a moment has no pods that are not ready.
		"readinessProbe": patiently(object{"httpGet": object{"path": "/alive", "port": control.Control}}),
	}
	spec := object{
		"serviceAccountName":            p.account(),
		"terminationGracePeriodSeconds": 1,
		"containers":                    []object{container},
		"securityContext":               object{"runAsUser": 65532},
	}
	if p.Node != "" {
		spec["nodeSelector"] = object{"kubernetes.io/hostname": p.Node}
	}
	if p.Socket {
		annotations["castellan.dev/workload-socket"] = "app"
		container["env"] = append(container["env"].([]object), object{
			"name": "SPIFFE_ENDPOINT_SOCKET", "value": "unix:///var/run/secrets/workload-spiffe-uds/socket"})
	}
	if p.Volume {
		spec["volumes"] = []object{{"name": "identity", "csi": object{"driver": "csi.castellan.dev", "readOnly": true}}}
		container["volumeMounts"] = []object{{"name": "identity", "mountPath": "/var/run/secrets/workload-spiffe-uds", "readOnly": true}}
	}
	if p.Change != nil {
		p.Change(spec)
	}
	return object{
		"apiVersion": "v1", "kind": "Pod",
		"metadata": object{"name": p.Name, "namespace": ns, "labels": labels, "annotations": annotations},
		"spec":     spec,
	}
}

// patiently is a probe that is made each second, and waits longer for an answer than any
// machine takes.
func patiently(probe object) object {
	probe["periodSeconds"], probe["timeoutSeconds"], probe["failureThreshold"] = 1, 10, 6
	return probe
}

func (p pod) account() string {
	if p.Account == "" {
		return p.Name
	}
	return p.Account
}

// account makes a service account, if there is none.
func account(ns, name string) error {
	err := api.post("/api/v1/namespaces/"+ns+"/serviceaccounts", object{"metadata": object{"name": name}}, nil)
	if isStatus(err, http.StatusConflict) {
		return nil
	}
	return err
}

// create makes pods without waiting for them.
func create(t testing.TB, ns string, pods ...pod) {
	t.Helper()
	for _, p := range pods {
		if err := account(ns, p.account()); err != nil {
			t.Fatal(err)
		}
	}
	var all sync.WaitGroup
	errs := make([]error, len(pods))
	for i, p := range pods {
		all.Go(func() { errs[i] = createPod(ns, p) })
	}
	all.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

func createPod(ns string, p pod) error {
	return admitted(func() error { return api.post("/api/v1/namespaces/"+ns+"/pods", p.object(ns), nil) })
}

// deploy makes pods and waits until they are ready.
func deploy(t testing.TB, ns string, pods ...pod) map[string]*app {
	t.Helper()
	create(t, ns, pods...)
	t.Cleanup(func() {
		if t.Failed() {
			dumpNamespace(t, ns)
		}
	})
	found := map[string]*app{}
	for _, p := range pods {
		found[p.Name] = awaitPod(t, ns, p.Name)
	}
	return found
}

// one is deploy for a single pod.
func one(t testing.TB, ns string, p pod) *app {
	t.Helper()
	return deploy(t, ns, p)[p.Name]
}

type podStatus struct {
	Metadata struct {
		Name, UID         string
		DeletionTimestamp *time.Time
	}
	Spec struct {
		NodeName, ServiceAccountName string
	}
	Status struct {
		Phase      string
		PodIPs     []struct{ IP string }
		Conditions []struct {
			Type, Status, Message string
			LastTransitionTime    time.Time
		}
		ContainerStatuses []struct {
			Name         string
			RestartCount int
			ContainerID  string
		}
		InitContainerStatuses []struct {
			Name         string
			RestartCount int
			ContainerID  string
		}
	}
}

func (p *podStatus) ready() bool {
	return slices.ContainsFunc(p.Status.Conditions, func(c struct {
		Type, Status, Message string
		LastTransitionTime    time.Time
	}) bool {
		return c.Type == "Ready" && c.Status == "True"
	})
}

func (p *podStatus) app(ns string) *app {
	a := &app{Namespace: ns, Name: p.Metadata.Name, UID: p.Metadata.UID, Node: p.Spec.NodeName, Account: p.Spec.ServiceAccountName}
	for _, ip := range p.Status.PodIPs {
		if strings.Contains(ip.IP, ":") {
			a.IP6 = ip.IP
		} else {
			a.IP = ip.IP
		}
	}
	return a
}

func awaitPod(t testing.TB, ns, name string) *app {
	t.Helper()
	var status podStatus
	// Many begin at once.
	within(t, 3*patience, ns+"/"+name+" becomes ready", func() error {
		status = podStatus{}
		if err := api.get("/api/v1/namespaces/"+ns+"/pods/"+name, &status); err != nil {
			return err
		}
		if !status.ready() {
			return fmt.Errorf("%s, %+v", status.Status.Phase, status.Status.Conditions)
		}
		return nil
	})
	return status.app(ns)
}

// deletePod deletes a pod and waits until its object is gone.
func deletePod(t testing.TB, ns, name string) {
	t.Helper()
	url := "/api/v1/namespaces/" + ns + "/pods/" + name
	if err := api.remove(url); err != nil && !isStatus(err, http.StatusNotFound) {
		t.Fatal(err)
	}
	eventually(t, ns+"/"+name+" is gone", func() error {
		err := api.get(url, nil)
		if isStatus(err, http.StatusNotFound) {
			return nil
		}
		return fmt.Errorf("still there: %w", err)
	})
}

// service makes a service for the pods with the label app=NAME, on all the ports.
func service(t testing.TB, ns, name string, change ...func(spec object)) {
	t.Helper()
	spec := object{
		"selector": object{"app": name}, "ipFamilyPolicy": "PreferDualStack",
		"ports": []object{
			{"name": "http", "port": 80, "targetPort": control.HTTP},
			{"name": "grpc", "port": control.GRPC},
			{"name": "tcp", "port": control.TCP},
			{"name": "tcp-greeting", "port": control.Greeting},
			{"name": "any", "port": control.Any},
			{"name": "excluded", "port": control.Excluded},
		},
	}
	for _, c := range change {
		c(spec)
	}
	err := api.post("/api/v1/namespaces/"+ns+"/services", object{"metadata": object{"name": name}, "spec": spec}, nil)
	if err != nil {
		t.Fatal(err)
	}
}

// containers are the names of a pod's containers, the init containers first.
func containers(t *testing.T, ns, name string) (names []string) {
	t.Helper()
	var p struct {
		Spec struct {
			InitContainers, Containers []struct{ Name string }
		}
	}
	if err := api.get("/api/v1/namespaces/"+ns+"/pods/"+name, &p); err != nil {
		t.Fatal(err)
	}
	for _, c := range slices.Concat(p.Spec.InitContainers, p.Spec.Containers) {
		names = append(names, c.Name)
	}
	return names
}
