package install

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"strings"

	"helm.sh/helm/v4/pkg/chart/common"
	"helm.sh/helm/v4/pkg/chart/common/util"
	"helm.sh/helm/v4/pkg/chart/loader/archive"
	v2 "helm.sh/helm/v4/pkg/chart/v2"
	"helm.sh/helm/v4/pkg/chart/v2/loader"
	"helm.sh/helm/v4/pkg/engine"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/yaml"

	"castellan.dev/deploy"
)

const (
	// DefaultNamespace is where Castellan lives unless it is told otherwise.
	DefaultNamespace = "castellan-system"
	// OldestKubernetes is the first version whose API has all that the chart uses.
	OldestKubernetes = "v1.31.0"
	// TestedKubernetes is the version that is rendered for where no cluster is asked.
	TestedKubernetes = "v1.36.3"

	// release is the name of what is installed; there is one in a cluster.
	release = "castellan"
	// manager is the field manager and the managed-by label of what we apply.
	manager = "castellan"

	labelManagedBy = "app.kubernetes.io/managed-by"
	labelName      = "app.kubernetes.io/name"
)

// Options say what to render.
type Options struct {
	// Namespace that all lives in; empty: DefaultNamespace.
	Namespace string
	// Values over the chart's own.
	Values map[string]any
	// KubeVersion is the cluster's; empty: TestedKubernetes.
	KubeVersion string
}

// ValuesError is a mistake in the values.
type ValuesError struct{ err error }

func (e *ValuesError) Error() string { return e.err.Error() }
func (e *ValuesError) Unwrap() error { return e.err }

// Rendered is everything that is to be in the cluster.
type Rendered struct {
	Namespace string
	// Version is the chart's, AppVersion that of the images.
	Version, AppVersion string
	CRDs                []*unstructured.Unstructured
	// Objects are in the order of their templates' names.
	Objects []*unstructured.Unstructured
	// Values are those asked for, without the chart's own.
	Values map[string]any
}

// Render makes the objects of the chart. It reads no cluster.
func Render(opts Options) (*Rendered, error) {
	if opts.Namespace == "" {
		opts.Namespace = DefaultNamespace
	}
	chart, err := loadChart()
	if err != nil {
		return nil, fmt.Errorf("chart: %w", err)
	}
	caps := common.DefaultCapabilities.Copy()
	if opts.KubeVersion == "" {
		opts.KubeVersion = TestedKubernetes
	}
	version, err := common.ParseKubeVersion(opts.KubeVersion)
	if err != nil {
		return nil, &ValuesError{fmt.Errorf("version %q of Kubernetes: %w", opts.KubeVersion, err)}
	}
	caps.KubeVersion = *version
	values, err := util.ToRenderValues(chart, opts.Values, common.ReleaseOptions{
		Name: release, Namespace: opts.Namespace, Revision: 1, IsInstall: true,
	}, caps)
	if err != nil {
		return nil, &ValuesError{readable(err)}
	}
	files, err := engine.Render(chart, values)
	if err != nil {
		return nil, &ValuesError{readable(err)}
	}
	r := &Rendered{Namespace: opts.Namespace, Version: chart.Metadata.Version, AppVersion: chart.Metadata.AppVersion, Values: opts.Values}
	if tag, _, _ := unstructured.NestedString(opts.Values, "image", "tag"); tag != "" {
		r.AppVersion = tag
	}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if base := path.Base(name); strings.HasPrefix(base, "_") || path.Ext(base) != ".yaml" {
			continue
		}
		objects, err := decode(files[name])
		if err != nil {
			return nil, fmt.Errorf("chart: %s: %w", name, err)
		}
		r.Objects = append(r.Objects, objects...)
	}
	for _, crd := range chart.CRDObjects() {
		objects, err := decode(string(crd.File.Data))
		if err != nil {
			return nil, fmt.Errorf("chart: %s: %w", crd.Filename, err)
		}
		r.CRDs = append(r.CRDs, objects...)
	}
	for _, o := range slices.Concat(r.CRDs, r.Objects) {
		setLabel(o, labelManagedBy, manager)
		setLabel(o, labelName, release)
	}
	return r, nil
}

func loadChart() (*v2.Chart, error) {
	files, err := deploy.Chart()
	if err != nil {
		return nil, err
	}
	var list []*archive.BufferedFile
	for _, name := range slices.Sorted(maps.Keys(files)) {
		list = append(list, &archive.BufferedFile{Name: name, Data: files[name]})
	}
	return loader.LoadFiles(list)
}

// decode reads YAML documents, leaving out empty ones.
func decode(text string) ([]*unstructured.Unstructured, error) {
	in := yaml.NewYAMLOrJSONDecoder(bytes.NewBufferString(text), 4096)
	var out []*unstructured.Unstructured
	for {
		object := map[string]any{}
		err := in.Decode(&object)
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			return nil, err
		}
		if len(object) > 0 {
			out = append(out, &unstructured.Unstructured{Object: object})
		}
	}
}

func setLabel(o *unstructured.Unstructured, key, value string) {
	labels := o.GetLabels()
	if labels == nil {
		labels = map[string]string{}
	}
	labels[key] = value
	o.SetLabels(labels)
}

// readable takes from an error of the engine what tells only about the engine:
// "- at '/mesh/outboundPolicy': …" becomes "mesh.outboundPolicy: …".
func readable(err error) error {
	text := err.Error()
	if _, own, ok := strings.Cut(text, "execution error at ("); ok {
		_, own, _ = strings.Cut(own, "): ")
		return errors.New(own)
	}
	if _, own, ok := strings.Cut(text, "in the following chart(s):\n"); ok {
		var problems []string
		for line := range strings.Lines(own) {
			at, problem, ok := strings.Cut(strings.TrimSpace(line), "': ")
			if !ok {
				continue
			}
			field := strings.ReplaceAll(strings.TrimPrefix(strings.TrimPrefix(at, "- at '"), "/"), "/", ".")
			if field != "" {
				problem = field + ": " + problem
			}
			problems = append(problems, problem)
		}
		return fmt.Errorf("values: %s", strings.Join(problems, "; "))
	}
	return fmt.Errorf("values: %w", err)
}
