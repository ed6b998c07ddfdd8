package kube

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"slices"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// The two parts of Castellan that answer an operator, by the label of their pods.
const (
	serverApp = "castellan-server"
	agentApp  = "castellan-agent"
)

// DialServer connects to the admin socket of a server in the client's namespace.
//
// RBAC: list on pods there, and what Dial needs.
func (c *Client) DialServer(ctx context.Context) (net.Conn, error) {
	pod, err := c.component(ctx, serverApp, "")
	if err != nil {
		return nil, err
	}
	return c.Dial(ctx, admin(pod, serverApp, "/etc/castellan/server.yaml"))
}

// DialAgent connects to the admin socket of the agent on a node.
//
// RBAC: as for DialServer.
func (c *Client) DialAgent(ctx context.Context, node string) (net.Conn, error) {
	pod, err := c.component(ctx, agentApp, node)
	if err != nil {
		return nil, err
	}
	return c.Dial(ctx, admin(pod, agentApp, "/etc/castellan/agent.yaml"))
}

// admin is the program that copies its standard input and output to the admin socket.
func admin(pod *corev1.Pod, app, config string) Exec {
	container := pod.Spec.Containers[0].Name
	for _, c := range pod.Spec.Containers {
		if c.Name == app {
			container = app
		}
	}
	return Exec{
		Namespace: pod.Namespace, Pod: pod.Name, Container: container,
		Command: []string{"/usr/bin/" + app, "admin-stdio", "-config", config},
	}
}

// component finds the pod to ask: one that is ready, or else one that runs, as
// somebody may want to know why it does not get ready.
func (c *Client) component(ctx context.Context, app, node string) (*corev1.Pod, error) {
	options := metav1.ListOptions{LabelSelector: "app=" + app}
	where := fmt.Sprintf("in namespace %s", c.namespace)
	if node != "" {
		options.FieldSelector = "spec.nodeName=" + node
		where = fmt.Sprintf("on node %s %s", node, where)
	}
	list, err := c.kubernetes.CoreV1().Pods(c.namespace).List(ctx, options)
	if apierrors.IsForbidden(err) {
		return nil, fmt.Errorf("kube: %w; this needs the verb list on pods in namespace %s", err, c.namespace)
	}
	if err != nil {
		return nil, fmt.Errorf("kube: pods of %s: %w", app, err)
	}
	pods := slices.DeleteFunc(list.Items, func(p corev1.Pod) bool {
		return node != "" && p.Spec.NodeName != node || p.DeletionTimestamp != nil || len(p.Spec.Containers) == 0
	})
	if len(pods) == 0 {
		return nil, fmt.Errorf("kube: there is no pod of %s (label app=%s) %s; is Castellan installed there? --castellan-namespace names another namespace", app, app, where)
	}
	slices.SortFunc(pods, func(a, b corev1.Pod) int {
		return cmp.Or(cmp.Compare(podState(&b), podState(&a)), cmp.Compare(a.Name, b.Name))
	})
	best := &pods[0]
	if podState(best) == podStopped {
		return nil, fmt.Errorf("kube: pod %s/%s of %s is not running: %s; see `kubectl describe pod -n %s %s`", best.Namespace, best.Name, app, podTrouble(best), best.Namespace, best.Name)
	}
	return best, nil
}

const (
	podStopped = iota
	podRunning
	podReady
)

func podState(p *corev1.Pod) int {
	if p.Status.Phase != corev1.PodRunning || slices.ContainsFunc(p.Status.ContainerStatuses, func(s corev1.ContainerStatus) bool { return s.State.Running == nil }) {
		return podStopped
	}
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue {
			return podReady
		}
	}
	return podRunning
}

// podTrouble says why a pod does not run.
func podTrouble(p *corev1.Pod) string {
	for _, s := range append(slices.Clone(p.Status.InitContainerStatuses), p.Status.ContainerStatuses...) {
		switch {
		case s.State.Waiting != nil && s.State.Waiting.Reason != "":
			return s.Name + ": " + s.State.Waiting.Reason
		case s.State.Terminated != nil && s.State.Terminated.ExitCode != 0:
			return fmt.Sprintf("%s: %s, code %d", s.Name, s.State.Terminated.Reason, s.State.Terminated.ExitCode)
		}
	}
	return string(p.Status.Phase)
}
