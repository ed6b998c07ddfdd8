// Package kube is the only room with a Kubernetes client. It reads what the
// server must know of a cluster (pods, accounts, services, policies, the API
// server's token keys) and writes the little that the server leaves there (its
// keys' Secret, the published roots, its webhooks' trust, a taint, statuses). It
// yields plain values: nobody else in the product meets a Kubernetes object.
//
// It refuses to guess: what the API server has not said is "not known now", which
// its callers turn into "ask again" and never into a permission. It refuses to
// write over what somebody else wrote in between, and over a Secret that is not
// its own. It assumes that whoever may write pods, service accounts and nodes of
// the cluster may decide who exists, as everything in Kubernetes does, and that
// only this server may read its Secret.
//
// The calls it makes and the permission each needs are listed beside them, as
// "RBAC:" lines, and for the whole server in docs/kubernetes.md.
package kube
