package cluster_test

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// pair runs a serving pod on each node, behind the service "echo".
func pair(t *testing.T, ns string) {
	t.Helper()
	namespace(t, ns)
	ports := []object{{"port": 80, "targetPort": 8080}}
	apply(t, ns,
		pod("one", "node-1", "serve"), pod("two", "node-2", "serve"),
		service("echo", object{"ports": ports, "ipFamilyPolicy": "RequireDualStack"}),
		service("peers", object{"ports": ports, "clusterIP": "None"}),
	)
	waitPods(t, ns, "one", "two")
	for _, p := range []string{"one", "two"} {
		eventually(t, p+" listens", func() error {
			_, err := probe(ns, p, "get", "http://localhost:8080")
			return err
		})
	}
}

// fails asks for url in a pod until it is told that there is nothing, and why.
func fails(t *testing.T, ns, pod, url, why string) {
	t.Helper()
	eventually(t, url+" fails from "+pod, func() error {
		if out, err := probe(ns, pod, "get", url); err == nil || !strings.Contains(out, why) {
			return fmt.Errorf("%q, %w, want %q", out, err, why)
		}
		return nil
	})
}

// answersFromBoth asks url in a pod until the pods of both nodes have answered.
func answersFromBoth(t *testing.T, ns, pod, url string) {
	t.Helper()
	seen := map[string]bool{}
	eventually(t, url+" from "+pod, func() error {
		out, err := probe(ns, pod, "get", url)
		if err != nil {
			return err
		}
		seen[out] = true
		if !seen["one"] || !seen["two"] {
			return fmt.Errorf("answers only from %v", seen)
		}
		return nil
	})
}

func TestServicesAnswerByName(t *testing.T) {
	needCluster(t)
	const ns = "names"
	pair(t, ns)
	for _, url := range []string{"http://echo", "http://echo.names", "http://echo.names.svc.cluster.local"} {
		answersFromBoth(t, ns, "one", url)
	}
	// A headless name is the pods' own addresses, of which the client takes one.
	eventually(t, "by the headless name", func() error {
		if out, err := probe(ns, "one", "get", "http://peers:8080"); err != nil || (out != "one" && out != "two") {
			return fmt.Errorf("%q, %w", out, err)
		}
		return nil
	})
	answersFromBoth(t, ns, "two", "http://echo")
	out, err := kubectl("", "get", "-n", ns, "service", "echo", "-o", "jsonpath={.spec.clusterIPs[1]}")
	answersFromBoth(t, ns, "one", "http://["+must(t, out, err)+"]")

	fails(t, ns, "one", "http://nothing.names.svc.cluster.local", "no such host")
	fails(t, ns, "one", "http://example.com", "no such host")
	fails(t, ns, "one", "http://192.0.2.1", "unreachable")
}

func TestLogsAndForwardedPorts(t *testing.T) {
	needCluster(t)
	const ns = "streams"
	pair(t, ns)
	eventually(t, "its log", func() error {
		if out, err := kubectl("", "logs", "-n", ns, "two"); err != nil || out != "probe is serving" {
			return fmt.Errorf("%q, %w", out, err)
		}
		return nil
	})
	cmd := exec.Command(shared.Kubectl(), "--kubeconfig", shared.Kubeconfig(), "port-forward", "-n", ns, "pod/two", ":8080")
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	// "Forwarding from 127.0.0.1:PORT -> 8080"
	resp, err := (&http.Client{Timeout: patience}).Get("http://" + strings.Fields(line)[2])
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := bufio.NewReader(resp.Body).ReadString(0)
	if body != "two" {
		t.Errorf("through the forwarded port: %q, %v", body, err)
	}
}

func TestVolumesAreOfferedAgain(t *testing.T) {
	needCluster(t)
	const ns = "volumes"
	namespace(t, ns)
	p := pod("writer", "", "serve")
	spec := p["spec"].(object)
	spec["volumes"] = []object{{"name": "data", "persistentVolumeClaim": object{"claimName": "data"}}}
	spec["containers"].([]object)[0]["volumeMounts"] = []object{{"name": "data", "mountPath": "/data"}}
	claim := object{
		"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": object{"name": "data"},
		"spec": object{"accessModes": []string{"ReadWriteOnce"}, "resources": object{"requests": object{"storage": "1Gi"}}},
	}
	apply(t, ns, claim, p)
	waitPods(t, ns, "writer")
	_, err := probe(ns, "writer", "write", "/data/file", "text")
	must(t, "", err)
	out, err := kubectl("", "get", "-n", ns, "pvc", "data", "-o", "jsonpath={.spec.volumeName}")
	volume := must(t, out, err)
	node, err := shared.Node("node-1")
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(node.Root, "var/lib/castellan-volumes", volume, "file")
	if data, err := os.ReadFile(file); string(data) != "text" {
		t.Errorf("in the volume: %q, %v", data, err)
	}
	_, err = kubectl("", "delete", "-n", ns, "pod/writer", "pvc/data", "--wait=false")
	must(t, "", err)
	eventually(t, "the volume is free", func() error {
		if phase, err := kubectl("", "get", "pv", volume, "-o", "jsonpath={.status.phase}"); err != nil || phase != "Available" {
			return fmt.Errorf("%q, %w", phase, err)
		}
		return nil
	})
	if _, err := os.Stat(file); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the volume is offered with what was in it: %v", err)
	}
}

func TestNodesHaveTheirOwnFolders(t *testing.T) {
	needCluster(t)
	ctx := context.Background()
	first, err := shared.Node("node-1")
	if err != nil {
		t.Fatal(err)
	}
	second, err := shared.Node("node-2")
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{"/run", "/var/lib", "/var/log"} {
		file := dir + "/castellan-testbed-probe"
		if out, err := first.Command(ctx, "touch", file).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		if _, err := os.Stat(first.Root + file); err != nil {
			t.Error(err)
		}
		for _, elsewhere := range []string{file, second.Root + file} {
			if _, err := os.Stat(elsewhere); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%s of one node is seen elsewhere: %v", dir, err)
			}
		}
	}
	out, err := first.Command(ctx, "ip", "-brief", "address", "show", "eth0").CombinedOutput()
	if err != nil || !strings.Contains(string(out), first.IP+"/") {
		t.Errorf("addresses of node-1: %s, %v", out, err)
	}
	running, cancel := context.WithCancel(ctx)
	cmd := first.Command(running, "sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := cmd.Wait(); err == nil {
		t.Error("a cancelled program ended by itself")
	}
}

// TestMountsPropagate does what a CSI driver in a pod does for another pod.
func TestMountsPropagate(t *testing.T) {
	needCluster(t)
	const ns = "mounts"
	namespace(t, ns)
	driver, user := pod("driver", "node-2", "serve"), pod("user", "node-2", "serve")
	for p, mount := range map[*object]object{
		&driver: {"name": "plugin", "mountPath": "/var/lib/kubelet", "mountPropagation": "Bidirectional"},
		&user:   {"name": "plugin", "mountPath": "/seen", "mountPropagation": "HostToContainer"},
	} {
		spec := (*p)["spec"].(object)
		spec["volumes"] = []object{{"name": "plugin", "hostPath": object{"path": "/var/lib/kubelet"}}}
		container := spec["containers"].([]object)[0]
		container["securityContext"] = object{"privileged": true}
		container["volumeMounts"] = []object{mount}
	}
	apply(t, ns, driver, user)
	waitPods(t, ns, "driver", "user")
	const dir = "/var/lib/kubelet/plugins"
	for _, args := range [][]string{{"mount", dir}, {"write", dir + "/file", "text"}} {
		_, err := probe(ns, "driver", args...)
		must(t, "", err)
	}
	out, err := probe(ns, "user", "read", "/seen/plugins/file")
	if must(t, out, err) != "text" {
		t.Errorf("the other pod sees %q", out)
	}
	_, err = probe(ns, "driver", "unmount", dir)
	must(t, "", err)
}

func TestWebhooksAreReached(t *testing.T) {
	needCluster(t)
	const ns = "hooks"
	namespace(t, ns)
	cert, key := selfSigned(t, "hook.hooks.svc")
	p := pod("hook", "node-2", "refuse")
	spec := p["spec"].(object)
	spec["volumes"] = []object{{"name": "tls", "secret": object{"secretName": "tls"}}}
	spec["containers"].([]object)[0]["volumeMounts"] = []object{{"name": "tls", "mountPath": "/tls"}}
	apply(t, ns,
		object{
			"apiVersion": "v1", "kind": "Secret", "metadata": object{"name": "tls"}, "type": "kubernetes.io/tls",
			"data": object{"tls.crt": cert, "tls.key": key},
		},
		p, service("hook", object{"ports": []object{{"port": 443, "targetPort": 8443}}}),
	)
	waitPods(t, ns, "hook")
	apply(t, ns, object{
		"apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingWebhookConfiguration",
		"metadata": object{"name": "testbed-refuses"},
		"webhooks": []object{{
			"name": "refuse.castellan.dev", "admissionReviewVersions": []string{"v1"}, "sideEffects": "None", "failurePolicy": "Ignore",
			"clientConfig":      object{"caBundle": cert, "service": object{"name": "hook", "namespace": ns}},
			"namespaceSelector": object{"matchLabels": object{"kubernetes.io/metadata.name": ns}},
			"rules":             []object{{"apiGroups": []string{""}, "apiVersions": []string{"v1"}, "operations": []string{"CREATE"}, "resources": []string{"configmaps"}}},
		}},
	})
	t.Cleanup(func() {
		if _, err := kubectl("", "delete", "validatingwebhookconfiguration", "testbed-refuses"); err != nil {
			t.Error(err)
		}
	})
	eventually(t, "the webhook refuses", func() error {
		_, err := kubectl("", "create", "-n", ns, "--dry-run=server", "configmap", "anything")
		if err == nil || !strings.Contains(err.Error(), "the probe refuses") {
			return fmt.Errorf("got %w", err)
		}
		return nil
	})
}

// selfSigned is a certificate for name that is its own authority, base64 of PEM.
func selfSigned(t *testing.T, name string) (cert, key string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), DNSNames: []string{name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	encode := func(kind string, der []byte) string {
		return base64.StdEncoding.EncodeToString(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
	}
	return encode("CERTIFICATE", der), encode("PRIVATE KEY", pkcs8)
}
