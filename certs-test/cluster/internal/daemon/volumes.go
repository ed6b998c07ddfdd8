package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"time"
)

// volumes is how many local volumes there are, all on the first node.
const volumes = 8

// volumePath is where a volume is on its node.
func volumePath(name string) string { return filepath.Join("/var/lib/castellan-volumes", name) }

// createVolumes makes the default storage class and its volumes.
func (d *daemon) createVolumes(ctx context.Context) error {
	class := object{
		"apiVersion": "storage.k8s.io/v1", "kind": "StorageClass",
		"metadata":          object{"name": "local", "annotations": object{"storageclass.kubernetes.io/is-default-class": "true"}},
		"provisioner":       "kubernetes.io/no-provisioner",
		"volumeBindingMode": "WaitForFirstConsumer",
	}
	if err := d.api.call(ctx, http.MethodPost, "/apis/storage.k8s.io/v1/storageclasses", "application/json", class, nil); err != nil {
		return err
	}
	n := d.nodes[0]
	for i := range volumes {
		name := fmt.Sprintf("local-%d", i+1)
		if err := os.MkdirAll(n.path(volumePath(name)), 0o777); err != nil {
			return err
		}
		if err := os.Chmod(n.path(volumePath(name)), 0o777); err != nil {
			return err
		}
		volume := object{
			"apiVersion": "v1", "kind": "PersistentVolume",
			"metadata": object{"name": name},
			"spec": object{
				"accessModes":                   []string{"ReadWriteOnce"},
				"capacity":                      object{"storage": "5Gi"},
				"local":                         object{"path": volumePath(name)},
				"persistentVolumeReclaimPolicy": "Retain",
				"storageClassName":              "local",
				"nodeAffinity": object{"required": object{"nodeSelectorTerms": []object{{
					"matchExpressions": []object{{"key": "kubernetes.io/hostname", "operator": "In", "values": []string{n.Name}}},
				}}}},
			},
		}
		if err := d.api.call(ctx, http.MethodPost, "/api/v1/persistentvolumes", "application/json", volume, nil); err != nil {
			return err
		}
	}
	return nil
}

// reclaimVolumes empties volumes whose claims are gone and offers them again, which
// is a provisioner's work, and there is none.
func (d *daemon) reclaimVolumes(ctx context.Context) {
	for {
		time.Sleep(time.Second)
		var list struct {
			Items []struct {
				Metadata struct{ Name string }
				Status   struct{ Phase string }
			}
		}
		if err := d.api.get(ctx, "/api/v1/persistentvolumes", &list); err != nil {
			continue // the API server may be down for a test
		}
		for _, v := range list.Items {
			if v.Status.Phase != "Released" {
				continue
			}
			if err := d.reclaim(ctx, v.Metadata.Name); err != nil {
				fmt.Fprintf(os.Stderr, "volume %s: %v\n", v.Metadata.Name, err)
			}
		}
	}
}

func (d *daemon) reclaim(ctx context.Context, name string) error {
	dir := d.nodes[0].path(volumePath(name))
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // not one of ours
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	patch := object{"spec": object{"claimRef": nil}}
	return d.api.call(ctx, http.MethodPatch, "/api/v1/persistentvolumes/"+name, "application/merge-patch+json", patch, nil)
}
