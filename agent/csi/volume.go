package csi

import (
	"os"
	"time"

	"castellan.dev/agent/caclient"
	"castellan.dev/identity"
)

// Volume is one published volume: a pod's, with the pod's token as the kubelet
// gave it. What it says of the pod has been found equal in the volume's path, in
// what the kubelet says of the pod, and in the token.
type Volume struct {
	ID string
	// Target is where the kubelet wants it.
	Target  string
	Account identity.Account
	PodName string
	PodUID  string
	// Token proves the pod to the server; who verifies it is the server.
	Token caclient.Credential
	// Expires is when the kubelet says the token does.
	Expires time.Time
}

// Host serves pods.
type Host interface {
	// Open serves v's pod on a socket in dir, which the caller closes. The socket
	// listens when Open returns, and a certificate is being asked for.
	Open(v Volume, dir *os.File) (Endpoint, error)
}

// Endpoint is one volume that is being served.
type Endpoint interface {
	// Renew takes the pod's newest token.
	Renew(token caclient.Credential)
	// Alive reports whether the socket is still in its place and answered.
	Alive() bool
	// Close ends every stream and removes the socket. With the last volume of a pod
	// its key and token go.
	Close()
}
