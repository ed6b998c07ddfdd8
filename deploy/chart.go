// Package deploy carries the Helm chart, and the CRDs that belong to it, inside
// the castellan command, so that `castellan install` needs no other file. The files
// are the same that helm reads from deploy/chart.
package deploy

import (
	"embed"
	"io/fs"
	"path"
	"strings"
)

//go:embed all:chart
var chart embed.FS

//go:embed crds
var crds embed.FS

// Chart returns the chart's files by their path in it. CRDs are in crds/, which in
// the tree is a link to the folder beside the chart.
func Chart() (map[string][]byte, error) {
	files := map[string][]byte{}
	for root, in := range map[string]embed.FS{"chart": chart, "crds": crds} {
		err := fs.WalkDir(in, root, func(name string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || root == "crds" && path.Ext(name) != ".yaml" {
				return err
			}
			data, err := in.ReadFile(name)
			files[strings.TrimPrefix(name, "chart/")] = data
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	return files, nil
}
