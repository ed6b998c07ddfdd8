package kubernetes_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
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
		"readinessProbe": object{"httpGet": object{"path": "/alive", "port": control.Control}, "periodSeconds": 1},
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
		all.Go(func() { errs[i] = api.post("/api/v1/namespaces/"+ns+"/pods", p.object(ns), nil) })
	}
	all.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
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
	eventually(t, ns+"/"+name+" becomes ready", func() error {
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

// ask speaks to the application's control port.
func (a *app) ask(method, path string, in, out any) error {
	body, err := json.Marshal(in)
	if err != nil {
		return err
	}
	req, err := http.NewRequest(method, "http://"+net.JoinHostPort(a.IP, fmt.Sprint(control.Control))+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	resp, err := controller().Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s of %s: %w", path, a.Name, &statusError{resp.StatusCode, string(data)})
	}
	return json.Unmarshal(data, out)
}

// call lets the application make a call.
func (a *app) call(c control.Call) (r control.Result, err error) {
	return r, a.ask("POST", "/call", c, &r)
}

// get is an HTTP request over a connection of its own.
func (a *app) get(url string, header ...string) (control.Result, error) {
	c := control.Call{Kind: "http", URL: url, Fresh: true, Header: map[string]string{}}
	for i := 0; i+1 < len(header); i += 2 {
		c.Header[header[i]] = header[i+1]
	}
	return a.call(c)
}

// reaches asks until the answer is 200, and returns it.
func (a *app) reaches(t testing.TB, url string, header ...string) control.Result {
	t.Helper()
	return a.answers(t, http.StatusOK, url, header...)
}

// answers asks until the answer has the status.
func (a *app) answers(t testing.TB, want int, url string, header ...string) (r control.Result) {
	t.Helper()
	eventually(t, fmt.Sprintf("%s -> %s is %d", a.Name, url, want), func() (err error) {
		if r, err = a.get(url, header...); err != nil {
			return err
		}
		if r.Status != want {
			return fmt.Errorf("%+v", r)
		}
		return nil
	})
	return r
}

// fails makes a call until it fails twice in a row, in the same way, and the application
// has not been reached: without an answer, or with one of a proxy. Once may be chance.
func (a *app) fails(t *testing.T, c control.Call) (r control.Result) {
	t.Helper()
	c.Fresh = true
	last := -1
	eventually(t, fmt.Sprintf("%s cannot call %s %s", a.Name, c.Kind, c.URL), func() (err error) {
		if r, err = a.call(c); err != nil {
			return err
		}
		if r.Error == "" && r.Status < 400 || r.Seen != nil {
			last = -1
			return fmt.Errorf("%+v", r)
		}
		if last != r.Status {
			last = r.Status
			return fmt.Errorf("failed once: %+v", r)
		}
		return nil
	})
	return r
}

// id is the SPIFFE ID that the pod must have.
func (a *app) id() string {
	return "spiffe://cluster.local/ns/" + a.Namespace + "/sa/" + a.Account
}

// url of the application by its pod's address.
func (a *app) url(port int, path string) string {
	return "http://" + a.addr(port) + path
}

func (a *app) addr(port int) string { return net.JoinHostPort(a.IP, fmt.Sprint(port)) }

// calledBy fails the test unless the application saw the caller, proved by mutual TLS.
func calledBy(t *testing.T, r control.Result, caller *app) {
	t.Helper()
	if r.Seen == nil {
		t.Fatalf("no answer of the application: %+v", r)
	}
	var xfcc []string
	for name, values := range r.Seen.Header { // gRPC's are in lower case
		if strings.EqualFold(name, "x-forwarded-client-cert") {
			xfcc = values
		}
	}
	if len(xfcc) != 1 || !strings.Contains(xfcc[0], "URI="+caller.id()) {
		t.Errorf("the application saw the caller %q, want %s", xfcc, caller.id())
	}
}

// outcome is an error unless the call was answered with success.
func outcome(r control.Result) error {
	if r.Error != "" || r.Status >= 400 {
		return fmt.Errorf("%+v", r)
	}
	return nil
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
