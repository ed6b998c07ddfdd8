package install

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// maxReason bounds what is shown of a message that a pod left.
const maxReason = 300

// askTimeout bounds the question to one pod.
const askTimeout = 2 * time.Second

// whyNot says why pods of a Deployment or DaemonSet are not ready, as far as the
// cluster knows: the first reason found.
func (in *Installer) whyNot(ctx context.Context, r ref) string {
	pods, err := in.cfg.Kubernetes.CoreV1().Pods(r.Namespace).List(ctx, metav1.ListOptions{LabelSelector: "app=" + r.Name})
	if err != nil {
		return ""
	}
	slices.SortFunc(pods.Items, func(a, b corev1.Pod) int { return strings.Compare(a.Name, b.Name) })
	for i := range pods.Items {
		if why := podTrouble(&pods.Items[i]); why != "" {
			return where(&pods.Items[i]) + ": " + why
		}
	}
	for i := range pods.Items {
		if why := in.ownWord(ctx, &pods.Items[i]); why != "" {
			return where(&pods.Items[i]) + ": " + why
		}
	}
	for i := range pods.Items {
		if why := in.lastWarning(ctx, &pods.Items[i]); why != "" && !podReady(&pods.Items[i]) {
			return where(&pods.Items[i]) + ": " + why
		}
	}
	return ""
}

func where(pod *corev1.Pod) string {
	if pod.Spec.NodeName == "" {
		return "pod " + pod.Name
	}
	return "pod " + pod.Name + " on " + pod.Spec.NodeName
}

func podReady(pod *corev1.Pod) bool {
	return slices.ContainsFunc(pod.Status.Conditions, func(c corev1.PodCondition) bool {
		return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
	})
}

// podTrouble is what keeps a pod from being ready, empty when nothing is said to.
func podTrouble(pod *corev1.Pod) string {
	if podReady(pod) {
		return ""
	}
	for _, c := range slices.Concat(pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses) {
		if last := c.LastTerminationState.Terminated; last != nil && c.RestartCount > 0 {
			return fmt.Sprintf("%s ended with code %d after %d starts: %s", c.Name, last.ExitCode, c.RestartCount, shorten(last.Reason, lastLine(last.Message)))
		}
		if w := c.State.Waiting; w != nil && w.Reason != "ContainerCreating" && w.Reason != "PodInitializing" {
			return shorten(w.Reason, w.Message)
		}
	}
	for _, c := range pod.Status.Conditions {
		if c.Type == corev1.PodScheduled && c.Status == corev1.ConditionFalse {
			return shorten(c.Reason, c.Message)
		}
	}
	return ""
}

// ownWord is what a program of ours that runs says of why it is not ready.
func (in *Installer) ownWord(ctx context.Context, pod *corev1.Pod) string {
	if pod.Status.Phase != corev1.PodRunning || podReady(pod) {
		return ""
	}
	port := ""
	for _, c := range pod.Spec.Containers {
		for _, p := range c.Ports {
			if p.Name == "http" {
				port = strconv.Itoa(int(p.ContainerPort))
			}
		}
	}
	if port == "" {
		return ""
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	// Not being ready is a status of 503, and so an error; what is said comes with it.
	answer, _ := in.cfg.Kubernetes.CoreV1().Pods(pod.Namespace).ProxyGet("http", pod.Name, port, "readyz", map[string]string{"verbose": "1"}).DoRaw(ctx)
	var failing []string
	for line := range strings.Lines(string(answer)) {
		if check, ok := strings.CutPrefix(line, "[-] "); ok {
			failing = append(failing, strings.TrimSpace(check))
		}
	}
	return shorten(strings.Join(failing, "; "))
}

// lastWarning is the latest Warning about a pod: a volume that is not there, a
// probe that fails.
func (in *Installer) lastWarning(ctx context.Context, pod *corev1.Pod) string {
	events, err := in.cfg.Kubernetes.CoreV1().Events(pod.Namespace).List(ctx, metav1.ListOptions{
		FieldSelector: "involvedObject.uid=" + string(pod.UID) + ",type=" + corev1.EventTypeWarning,
	})
	if err != nil {
		return ""
	}
	// That a probe failed is known; why is in its own word.
	list := slices.DeleteFunc(events.Items, func(e corev1.Event) bool { return e.Reason == "Unhealthy" })
	if len(list) == 0 {
		return ""
	}
	last := slices.MaxFunc(list, func(a, b corev1.Event) int { return a.LastTimestamp.Compare(b.LastTimestamp.Time) })
	return shorten(last.Reason, last.Message)
}

// lastLine is where a program says why it ends.
func lastLine(text string) string {
	text = strings.TrimSpace(text)
	return text[strings.LastIndexByte(text, '\n')+1:]
}

// shorten joins what a pod or the cluster said to one line: others wrote it.
func shorten(parts ...string) string {
	var out []string
	for _, p := range parts {
		if p = strings.Join(strings.Fields(p), " "); p != "" {
			out = append(out, p)
		}
	}
	text := strings.Join(out, ": ")
	if len(text) > maxReason {
		text = text[:maxReason] + "…"
	}
	return text
}
