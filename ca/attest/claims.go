package attest

import (
	"errors"
	"fmt"

	"castellan.dev/identity"
	"castellan.dev/internal/jws"
)

// maxUID bounds UIDs and names out of tokens, which go into ledger and logs.
const maxUID = 253

// claims is what a service-account token says, read once. It is immutable.
type claims struct {
	account    identity.Account
	accountUID string
	podName    string
	podUID     string
	node       string
	nodeUID    string

	cluster string
	// What it was verified with; nil when its issuer was asked instead.
	token  *jws.Token
	issuer *Issuer
	keys   *jws.KeySet
}

// readClaims reads the claims of a token bound to a pod, as Kubernetes makes them
// (the private claim kubernetes.io). Every part is needed: a token that is not
// bound to a pod and a node proves too little.
func readClaims(t *jws.Token) (*claims, error) {
	k8s, ok := t.Claims["kubernetes.io"].(map[string]any)
	if !ok {
		return nil, errors.New("token has no claim kubernetes.io: it is no service-account token")
	}
	namespace, _ := k8s["namespace"].(string)
	account, accountUID, err := reference(k8s, "serviceaccount")
	if err != nil {
		return nil, err
	}
	c := &claims{accountUID: accountUID, token: t}
	if c.account, err = identity.NewAccount(namespace, account); err != nil {
		return nil, err
	}
	// Kubernetes says the same twice; a token in which they differ is not its work.
	if want := "system:serviceaccount:" + namespace + ":" + account; t.Subject != want {
		return nil, fmt.Errorf("sub is %q, the claim kubernetes.io means %q", clip(t.Subject), want)
	}
	if c.podName, c.podUID, err = reference(k8s, "pod"); err != nil {
		return nil, err
	}
	if c.node, c.nodeUID, err = reference(k8s, "node"); err != nil {
		return nil, err
	}
	if accountUID == "" || c.podUID == "" {
		return nil, errors.New("token does not say the UIDs of pod and service account")
	}
	return c, nil
}

// reference reads {"name": ..., "uid": ...}.
func reference(k8s map[string]any, kind string) (name, uid string, err error) {
	ref, ok := k8s[kind].(map[string]any)
	if !ok {
		return "", "", fmt.Errorf("token is not bound to a %s", kind)
	}
	name, _ = ref["name"].(string)
	uid, _ = ref["uid"].(string)
	if name == "" || len(name) > maxUID || len(uid) > maxUID {
		return "", "", fmt.Errorf("token's %s has no usable name or UID", kind)
	}
	return name, uid, nil
}
