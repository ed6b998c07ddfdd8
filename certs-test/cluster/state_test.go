package cluster

import (
	"context"
	"os"
	"os/exec"
	"testing"
)

func TestKillSparesAReusedNumber(t *testing.T) {
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Wait() }()
	real, err := identify(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	earlier := process{PID: real.PID, Started: "1"}
	if earlier.alive() {
		t.Error("a process counts as an earlier one with its number")
	}
	if err := earlier.kill(context.Background()); err != nil {
		t.Error(err)
	}
	if !real.alive() {
		t.Error("a process was ended in place of an earlier one with its number")
	}
	if err := real.kill(context.Background()); err != nil {
		t.Error(err)
	}
	// Not waited for yet: a zombie, which counts as gone.
	if real.alive() {
		t.Error("the process is alive")
	}
	if err := real.kill(context.Background()); err != nil {
		t.Errorf("ending it again: %v", err)
	}
}

func TestConfigNames(t *testing.T) {
	for name, config := range map[string]Config{
		"path":      {Name: "../x"},
		"upper":     {Name: "Name"},
		"long":      {Name: "a23456789012345678901234"},
		"node":      {Nodes: []string{"node 1"}},
		"interface": {Nodes: []string{"a234567890123456"}},
		"twice":     {Nodes: []string{"node", "node"}},
		"control":   {Nodes: []string{"br0"}},
	} {
		if _, err := Start(context.Background(), config); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	var config Config
	if err := config.fill(); err != nil || config.Name != DefaultName || len(config.Nodes) != 2 {
		t.Errorf("defaults: %+v, %v", config, err)
	}
}

func TestLockIsExclusiveAndLeavesNothing(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("the folder of locks is root's")
	}
	unlock, err := lock("locktest")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := lock("locktest"); err == nil {
		t.Error("locked twice")
	}
	unlock()
	if _, err := os.Stat(dir("locktest") + ".lock"); !os.IsNotExist(err) {
		t.Errorf("the file is still there: %v", err)
	}
	unlock, err = lock("locktest")
	if err != nil {
		t.Fatal(err)
	}
	unlock()
}
