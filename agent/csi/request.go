package csi

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	csiv1 "github.com/container-storage-interface/spec/lib/go/csi"

	"castellan.dev/agent/caclient"
	"castellan.dev/identity"
)

// Keys of the kubelet in the volume context, and of tokens also in the secrets.
const (
	contextPrefix    = "csi.storage.k8s.io/"
	contextPod       = contextPrefix + "pod.name"
	contextNamespace = contextPrefix + "pod.namespace"
	contextUID       = contextPrefix + "pod.uid"
	contextAccount   = contextPrefix + "serviceAccount.name"
	contextEphemeral = contextPrefix + "ephemeral"
	contextTokens    = contextPrefix + "serviceAccount.tokens"
)

// record is a published volume as it is asked for, and as it is kept for the next
// agent. It holds a token: never log it.
type record struct {
	Volume         string    `json:"volume"`
	Target         string    `json:"target"`
	Namespace      string    `json:"namespace"`
	ServiceAccount string    `json:"serviceAccount"`
	PodName        string    `json:"podName"`
	PodUID         string    `json:"podUID"`
	Token          string    `json:"token"`
	Expires        time.Time `json:"expires"`
}

// errors of a request. Their text goes to the kubelet, and into the pod's events:
// it helps whoever wrote the pod, and holds nothing of a token.
var (
	errNotOurs   = errors.New("the token, the volume's path and the pod's description are not of one and the same pod")
	errNoToken   = errors.New("no token of the wanted audience came with the volume; the CSIDriver object must list the audience under tokenRequests")
	errPodInfo   = errors.New("no description of the pod came with the volume; the CSIDriver object must have podInfoOnMount: true")
	errEphemeral = errors.New("only ephemeral inline volumes are served")
	errReadOnly  = errors.New("the volume must be read-only: set readOnly: true in the pod's csi volume; an application that can write could put its own socket in the place")
)

// readRequest checks the form of what the kubelet asks for.
func readRequest(req *csiv1.NodePublishVolumeRequest, audience string) (record, error) {
	ctx := req.GetVolumeContext()
	switch {
	case !req.GetReadonly():
		return record{}, errReadOnly
	case ctx[contextEphemeral] != "true":
		return record{}, errEphemeral
	case ctx[contextUID] == "" || ctx[contextPod] == "" || ctx[contextNamespace] == "" || ctx[contextAccount] == "":
		return record{}, errPodInfo
	}
	if err := checkCapability(req); err != nil {
		return record{}, err
	}
	for key := range ctx {
		if !strings.HasPrefix(key, contextPrefix) {
			return record{}, fmt.Errorf("volume attribute %q is not known; the driver takes none", key)
		}
	}
	r := record{
		Volume: req.GetVolumeId(), Target: req.GetTargetPath(),
		Namespace: ctx[contextNamespace], ServiceAccount: ctx[contextAccount],
		PodName: ctx[contextPod], PodUID: ctx[contextUID],
	}
	// Where the cluster sends tokens as secrets, the volume context is what the
	// pod's author wrote into it.
	tokens, ok := req.GetSecrets()[contextTokens]
	if !ok {
		tokens = ctx[contextTokens]
	}
	var err error
	r.Token, r.Expires, err = pickToken(tokens, audience)
	return r, err
}

func checkCapability(req *csiv1.NodePublishVolumeRequest) error {
	c := req.GetVolumeCapability()
	switch {
	case c.GetMount() == nil:
		return errors.New("only volumes that are mounted are served, no block devices")
	case c.GetMount().GetFsType() != "":
		return errors.New("the volume has no file system type: leave fsType out")
	case len(c.GetMount().GetMountFlags()) > 0:
		return errors.New("the volume takes no mount flags")
	case req.GetStagingTargetPath() != "":
		return errors.New("the volume has no staging path")
	}
	return nil
}

// pickToken finds the token of our audience among those of the kubelet.
func pickToken(text, audience string) (string, time.Time, error) {
	if text == "" {
		return "", time.Time{}, errNoToken
	}
	var tokens map[string]struct {
		Token   string    `json:"token"`
		Expires time.Time `json:"expirationTimestamp"`
	}
	if json.Unmarshal([]byte(text), &tokens) != nil {
		// The decoder's error could quote a token.
		return "", time.Time{}, errors.New("the tokens that came with the volume cannot be read")
	}
	t, ok := tokens[audience]
	if !ok || t.Token == "" {
		return "", time.Time{}, errNoToken
	}
	return t.Token, t.Expires, nil
}

// volume checks the values of a record and that all it says is of one pod. Whether
// the token is genuine is for the server to find; this finds a token that came to
// the wrong pod.
func (r record) volume(kubeletDir, node string) (Volume, target, error) {
	if !volumeIDs.MatchString(r.Volume) {
		return Volume{}, target{}, errors.New("volume id has a form that no kubelet gives it")
	}
	t, err := parseTarget(kubeletDir, r.Target)
	if err != nil {
		return Volume{}, target{}, err
	}
	account, err := identity.NewAccount(r.Namespace, r.ServiceAccount)
	if err != nil {
		return Volume{}, target{}, fmt.Errorf("the pod's service account: %w", err)
	}
	if !podNames.MatchString(r.PodName) {
		return Volume{}, target{}, errors.New("the pod's name has a form that no pod's has")
	}
	token, err := caclient.NewCredential(r.Token)
	if err != nil {
		return Volume{}, target{}, err
	}
	claims, err := token.Claims()
	if err != nil {
		return Volume{}, target{}, err
	}
	// Fails closed: a token without these claims is not bound to a pod, and no pod's.
	same := []bool{
		r.PodUID == t.podUID, claims.PodUID == t.podUID, claims.PodName == r.PodName, claims.Account == account,
		// The server asks for the node's name; here only a wrong one is refused, so
		// that the server's refusal says what an old cluster lacks.
		claims.Node == "" || claims.Node == node,
	}
	if slices.Contains(same, false) {
		return Volume{}, target{}, errNotOurs
	}
	return Volume{
		ID: r.Volume, Target: r.Target, Account: account, PodName: r.PodName, PodUID: t.podUID,
		Token: token, Expires: r.Expires,
	}, t, nil
}
