package cli

import (
	"context"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"castellan.dev/internal/up"
)

// howTargeted says in help how target chooses.
const howTargeted = `The mesh is the one of --up if that is given; the cluster's if a flag of a cluster is
given, or when called as kubectl castellan; else that of .castellan/up.json in this
directory, if there is one; and else the cluster that kubectl would speak to.`

// target is where a command finds the mesh that it speaks of: one that castellan up
// runs on this machine, or one on Kubernetes.
type target struct {
	env  *env
	kube *meshFlags
	up   *string
	cmd  *cobra.Command
}

// targetFlags gives a command the flags of both.
func (e *env) targetFlags(cmd *cobra.Command) *target {
	return &target{env: e, cmd: cmd, up: upFlag(cmd), kube: addMeshFlags(cmd)}
}

// onCluster chooses, as howTargeted says.
func (t *target) onCluster() (bool, error) {
	upGiven, kubeGiven := t.cmd.Flags().Changed("up"), t.kube.given()
	switch {
	case upGiven && kubeGiven:
		return false, invalidf("--up is for a mesh on this machine, and the other flags are for a cluster; give either")
	case upGiven:
		return false, nil
	case kubeGiven || t.env.plugin:
		return true, nil
	}
	if _, err := os.Stat(*t.up); err == nil {
		return false, nil
	}
	return t.kube.configured(), nil
}

// upMesh reads the up.json of the mesh on this machine.
func (t *target) upMesh() (*up.File, error) {
	file, err := up.ReadFile(*t.up)
	if err != nil && !t.cmd.Flags().Changed("up") {
		return nil, fmt.Errorf("%w; for one on Kubernetes set KUBECONFIG, or give --kubeconfig", err)
	}
	return file, err
}

// server connects to the server's admin socket.
func (t *target) server(ctx context.Context) (*admin, error) {
	cluster, err := t.onCluster()
	if err != nil {
		return nil, err
	}
	if cluster {
		client, err := t.kube.client()
		if err != nil {
			return nil, err
		}
		return tunnelled(client.DialServer(ctx))
	}
	file, err := t.upMesh()
	if err != nil {
		return nil, err
	}
	conn, err := dialSocket(file.Server.Admin)
	return &admin{ClientConn: conn}, err
}
