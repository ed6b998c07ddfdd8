package harden

import (
	"testing"
	"testing/fstest"
)

func TestMemoryLimit(t *testing.T) {
	file := func(text string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(text + "\n")} }
	for name, tt := range map[string]struct {
		groups string
		tree   fstest.MapFS
		want   int64
		fails  bool
	}{
		"v2, in a container": {groups: "0::/\n", tree: fstest.MapFS{"memory.max": file("268435456")}, want: 268435456},
		"v2, a service": {groups: "0::/system.slice/a.service\n", tree: fstest.MapFS{
			"system.slice/a.service/memory.max": file("max"), "system.slice/memory.max": file("1000")}, want: 1000},
		"v2, the least": {groups: "0::/a/b\n", tree: fstest.MapFS{
			"a/b/memory.max": file("500"), "a/memory.max": file("1000")}, want: 500},
		"v2, none": {groups: "0::/a\n", tree: fstest.MapFS{"a/memory.max": file("max")}},
		// The path is the host's, and what is mounted is the container's own.
		"v1, in a container": {groups: "3:cpu,cpuacct:/kubepods/x\n2:memory:/kubepods/x\n0::/\n",
			tree: fstest.MapFS{"memory/memory.limit_in_bytes": file("134217728")}, want: 134217728},
		"v1, none":    {groups: "2:memory:/\n", tree: fstest.MapFS{"memory/memory.limit_in_bytes": file("9223372036854771712")}},
		"none at all": {groups: "2:memory:/\n0::/\n", tree: fstest.MapFS{}},
		"odd lines":   {groups: "x\n\n1:name=systemd:/\n", tree: fstest.MapFS{"memory.max": file("1")}},
		"no number":   {groups: "0::/\n", tree: fstest.MapFS{"memory.max": file("many")}, fails: true},
		"negative":    {groups: "0::/\n", tree: fstest.MapFS{"memory.max": file("-1")}, fails: true},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := memoryLimit([]byte(tt.groups), tt.tree)
			if got != tt.want || (err != nil) != tt.fails {
				t.Errorf("%d, %v", got, err)
			}
		})
	}
}

func TestMemory(t *testing.T) {
	if _, err := Memory(); err != nil {
		t.Error(err)
	}
}
