package install_test

import (
	"bytes"
	"testing"

	"helm.sh/helm/v4/pkg/chart/v2/loader"

	"castellan.dev/deploy"
)

// What helm reads from deploy/chart is what the command carries.
func TestSameAsHelm(t *testing.T) {
	carried, err := deploy.Chart()
	if err != nil {
		t.Fatal(err)
	}
	chart, err := loader.LoadDir("../../deploy/chart")
	if err != nil {
		t.Fatal(err)
	}
	if err := chart.Validate(); err != nil {
		t.Error(err)
	}
	read := map[string][]byte{}
	for _, f := range chart.Raw {
		read[f.Name] = f.Data
	}
	for name, data := range carried {
		if name == ".helmignore" {
			continue // read by helm, and no part of the chart
		}
		if !bytes.Equal(read[name], data) {
			t.Errorf("%s differs, or helm does not read it", name)
		}
		delete(read, name)
	}
	delete(read, "crds/README.md")
	for name := range read {
		t.Errorf("helm reads %s, which the command does not carry", name)
	}
	if len(chart.CRDObjects()) != 3 {
		t.Errorf("%d CRDs", len(chart.CRDObjects()))
	}
}
