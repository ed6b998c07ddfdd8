package kube

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/cache"

	"castellan.dev/identity"
)

const (
	// deletionLeeway is how long after its deletion time (which has the grace period
	// in it) a pod or account still counts: the API server's own rule for the tokens
	// bound to it (k8s.io/kubernetes/pkg/serviceaccount, jwt.DefaultLeeway).
	deletionLeeway = time.Minute
	// oldestView is how long after the API server was heard last what was known then
	// still counts (design, "Pod gone").
	oldestView = 10 * time.Minute
)

// ErrNoPod says that a pod certainly does not exist (any more), ErrNoAccount that
// its service account does not. Any other error says that it is not known now.
var (
	ErrNoPod     = errors.New("kube: no such pod")
	ErrNoAccount = errors.New("kube: no such service account")
)

// PodRef is a pod as its token names it.
type PodRef struct {
	Namespace, Name, UID string
	Account              identity.Account
	ServiceAccountUID    string
}

// Pod is a live pod.
type Pod struct {
	Account           identity.Account
	Name              string
	UID               string
	ServiceAccountUID string
	Node              string
}

// view is what is followed of pods and service accounts; *Informers is it.
type view interface {
	Pods() cache.Indexer
	ServiceAccounts() cache.Indexer
	Synced() bool
	LastContact() time.Time
}

// Pods answers for attestation which pods exist, from memory: a pod that is known
// costs the API server nothing. What memory does not hold, or holds otherwise than
// the caller's token says (it may be behind), is asked of the API server, once.
//
// A pod counts as gone when the API server would refuse its token: the object is
// away, has another UID, or should have been gone for a minute; and likewise its
// service account. A pod whose containers have all ended counts as gone as well,
// beyond that rule: nobody is left in it who could ask.
type Pods struct {
	view view
	live *lookup
	now  func() time.Time
}

// NewPods makes the view of informers, which somebody runs, and of a client for
// what they do not know. A nil clock is the real one; nil reg drops the metrics.
func NewPods(v view, c *Client, now func() time.Time, reg prometheus.Registerer) (*Pods, error) {
	if now == nil {
		now = time.Now
	}
	p := &Pods{view: v, live: newLookup(c.bounded, now), now: now}
	if reg != nil {
		if err := reg.Register(p.live.asked); err != nil {
			return nil, fmt.Errorf("kube: metrics: %w", err)
		}
	}
	return p, nil
}

// Pod returns the live pod with that UID. It fails with ErrNoPod or ErrNoAccount
// where that is certain, and with a passing error (MayPass) where nothing is known.
func (p *Pods) Pod(ctx context.Context, ref PodRef) (Pod, error) {
	pod, account, err := p.known(ref)
	if err != nil {
		return Pod{}, err
	}
	if pod == nil {
		if pod, err = p.live.pod(ctx, ref); err != nil {
			return Pod{}, err
		}
	}
	// Another account than the token's is the caller's to refuse; its UID is then
	// not worth a question.
	if account == nil && pod.Spec.ServiceAccountName == ref.Account.Name() {
		if account, err = p.live.account(ctx, ref); err != nil {
			return Pod{}, err
		}
	}
	return p.alive(pod, account)
}

// known returns what memory holds of the pod and of its account, nil for what must
// be asked for.
func (p *Pods) known(ref PodRef) (*corev1.Pod, *corev1.ServiceAccount, error) {
	if !p.view.Synced() {
		return nil, nil, away(errors.New("pods have not been listed yet"), "pod %s/%s", ref.Namespace, ref.Name)
	}
	if !p.fresh() {
		return nil, nil, nil
	}
	objects, err := p.view.Pods().ByIndex(IndexUID, ref.UID)
	if err != nil {
		return nil, nil, err
	}
	var pod *corev1.Pod
	if len(objects) == 1 {
		pod, _ = objects[0].(*corev1.Pod)
	}
	// Memory may be behind a pod's being assigned to its node, which happens once.
	if pod != nil && (pod.Spec.NodeName == "" || pod.Namespace != ref.Namespace) {
		pod = nil
	}
	account, err := p.accountOf(ref.Namespace, ref.Account.Name())
	if err != nil {
		return nil, nil, err
	}
	if account != nil && string(account.UID) != ref.ServiceAccountUID {
		account = nil // made anew: by now, or after memory was filled
	}
	return pod, account, nil
}

func (p *Pods) accountOf(namespace, name string) (*corev1.ServiceAccount, error) {
	obj, _, err := p.view.ServiceAccounts().GetByKey(namespace + "/" + name)
	if err != nil {
		return nil, err
	}
	account, _ := obj.(*corev1.ServiceAccount)
	return account, nil
}

// fresh reports whether memory is young enough to answer from.
func (p *Pods) fresh() bool {
	// A clock that stepped back must not make an old view young for ever.
	age := p.now().Sub(p.view.LastContact())
	return age >= -oldestView && age < oldestView
}

func (p *Pods) alive(pod *corev1.Pod, account *corev1.ServiceAccount) (Pod, error) {
	switch {
	case p.ended(pod):
		return Pod{}, fmt.Errorf("%w: %s/%s has ended (phase %q, to be gone by %v)", ErrNoPod, pod.Namespace, pod.Name, pod.Status.Phase, pod.DeletionTimestamp)
	case account != nil && p.deleted(account.DeletionTimestamp):
		return Pod{}, fmt.Errorf("%w: %s/%s is being deleted", ErrNoAccount, account.Namespace, account.Name)
	}
	a, err := identity.NewAccount(pod.Namespace, pod.Spec.ServiceAccountName)
	if err != nil {
		return Pod{}, err
	}
	live := Pod{Account: a, Name: pod.Name, UID: string(pod.UID), Node: pod.Spec.NodeName}
	if account != nil {
		live.ServiceAccountUID = string(account.UID)
	}
	return live, nil
}

func (p *Pods) ended(pod *corev1.Pod) bool {
	return pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed || p.deleted(pod.DeletionTimestamp)
}

func (p *Pods) deleted(at *metav1.Time) bool {
	return at != nil && at.Time.Before(p.now().Add(-deletionLeeway))
}

// OnNode returns the live pods of an account on a node, in a stable order, from
// memory only: nobody's certificate but a node proxy's hangs on it.
func (p *Pods) OnNode(_ context.Context, node string, account identity.Account) ([]Pod, error) {
	if !p.view.Synced() || !p.fresh() {
		return nil, away(errors.New("the view of pods is too old, or not there yet"), "pods of %s on node %q", account, node)
	}
	owner, err := p.accountOf(account.Namespace(), account.Name())
	if err != nil || owner == nil || p.deleted(owner.DeletionTimestamp) {
		return nil, err
	}
	objects, err := p.view.Pods().ByIndex(IndexNode, node)
	if err != nil {
		return nil, err
	}
	var pods []Pod
	for _, o := range objects {
		pod, ok := o.(*corev1.Pod)
		if !ok || pod.Namespace != account.Namespace() || pod.Spec.ServiceAccountName != account.Name() {
			continue
		}
		if live, err := p.alive(pod, owner); err == nil {
			pods = append(pods, live)
		}
	}
	slices.SortFunc(pods, func(a, b Pod) int { return strings.Compare(a.UID, b.UID) })
	return pods, nil
}
