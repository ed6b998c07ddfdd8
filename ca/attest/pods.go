package attest

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync/atomic"

	"castellan.dev/identity"
	"castellan.dev/internal/workloads"
)

// ErrNotFound says that a pod certainly does not exist. Any other error of Pods
// says that it is not known now.
var ErrNotFound = errors.New("attest: no such pod")

// ErrNoAccount says that a pod's service account certainly does not exist.
var ErrNoAccount = errors.New("attest: no such service account")

// PodRef is a pod as a token names it. A view that knows the account under another
// UID may be behind and can look again.
type PodRef struct {
	Namespace, Name, UID string
	Account              identity.Account
	ServiceAccountUID    string
}

// Pod is a live pod. Name and ServiceAccountUID may be empty: not known, not compared.
type Pod struct {
	Account           identity.Account
	Name              string
	UID               string
	ServiceAccountUID string
	Node              string
}

// Pods answers the question of trust rule 2: does this pod exist, and where.
type Pods interface {
	// Pod returns the live pod with that UID, ErrNotFound when there is none and
	// ErrNoAccount when its account is gone.
	Pod(ctx context.Context, ref PodRef) (Pod, error)
	// OnNode returns the live pods of an account on a node, in a stable order.
	OnNode(ctx context.Context, node string, account identity.Account) ([]Pod, error)
}

// FilePods answers from the workloads file.
type FilePods struct {
	current func() *workloads.File
	index   atomic.Pointer[podIndex]
}

// podIndex is one reading of the file by UID. It is immutable.
type podIndex struct {
	file *workloads.File
	pods map[string]Pod
}

// NewFilePods returns Pods over what current returns, (*workloads.Watcher).Current usually.
func NewFilePods(current func() *workloads.File) *FilePods { return &FilePods{current: current} }

var errNoView = errors.New("no workloads file has been read")

// view indexes the file when it is another than before. Two callers may do it at
// the same time; both indexes are right.
func (p *FilePods) view() (*podIndex, error) {
	file := p.current()
	if file == nil {
		return nil, errNoView
	}
	if ix := p.index.Load(); ix != nil && ix.file == file {
		return ix, nil
	}
	ix := &podIndex{file: file, pods: make(map[string]Pod, len(file.Workloads))}
	for i := range file.Workloads {
		w := &file.Workloads[i]
		ix.pods[w.PodUID] = Pod{
			Account: w.Account(), Name: w.PodName, UID: w.PodUID,
			ServiceAccountUID: w.ServiceAccountUID, Node: w.Node,
		}
	}
	p.index.Store(ix)
	return ix, nil
}

// Pod implements Pods.
func (p *FilePods) Pod(_ context.Context, ref PodRef) (Pod, error) {
	ix, err := p.view()
	if err != nil {
		return Pod{}, err
	}
	pod, ok := ix.pods[ref.UID]
	if !ok {
		return Pod{}, ErrNotFound
	}
	return pod, nil
}

// OnNode implements Pods.
func (p *FilePods) OnNode(_ context.Context, node string, account identity.Account) ([]Pod, error) {
	ix, err := p.view()
	if err != nil {
		return nil, err
	}
	var pods []Pod
	for _, pod := range ix.pods {
		if pod.Node == node && pod.Account == account {
			pods = append(pods, pod)
		}
	}
	slices.SortFunc(pods, func(a, b Pod) int { return strings.Compare(a.UID, b.UID) })
	return pods, nil
}
