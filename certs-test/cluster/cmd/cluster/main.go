// Command cluster starts and stops a test cluster, and loads images into one.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"castellan.dev/certs-test/cluster"
	"castellan.dev/certs-test/cluster/internal/daemon"
)

const usage = "usage: cluster [-name NAME] up | down | env | load TAR... | kill PROGRAM | start PROGRAM"

func main() {
	name := flag.String("name", cluster.DefaultName, "the cluster, where there are several")
	flag.Parse()
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer cancel()
	if err := run(ctx, *name, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(ctx context.Context, name string, args []string) error {
	if len(args) == 0 {
		return errors.New(usage)
	}
	verb, rest := args[0], args[1:]
	switch {
	case verb == "up" && len(rest) == 0:
		return up(ctx, name)
	case verb == "down" && len(rest) == 0:
		return cluster.Down(ctx, name)
	// What the cluster is made of starts itself with these.
	case verb == "init" && len(rest) == 1:
		return daemon.Init(rest[0])
	case verb == "daemon" && len(rest) == 1:
		return daemon.Run(rest[0])
	case verb == "hold" && len(rest) == 1:
		return daemon.Hold(rest[0])
	}
	c, err := cluster.Attach(name)
	if err != nil {
		return err
	}
	switch {
	case verb == "env" && len(rest) == 0:
		printEnv(c)
		return nil
	case verb == "load" && len(rest) > 0:
		return each(rest, func(tar string) error { return c.LoadImage(ctx, tar) })
	case verb == "kill" && len(rest) > 0:
		return each(rest, func(program string) error { return c.KillProcess(ctx, program) })
	case verb == "start" && len(rest) > 0:
		return each(rest, func(program string) error { return c.StartProcess(ctx, program) })
	}
	return errors.New(usage)
}

func each(args []string, do func(string) error) error {
	for _, arg := range args {
		if err := do(arg); err != nil {
			return err
		}
	}
	return nil
}

func up(ctx context.Context, name string) error {
	c, err := cluster.Start(ctx, cluster.Config{Name: name, Log: os.Stderr})
	if err != nil {
		return err
	}
	if err := c.Detach(); err != nil {
		return err
	}
	fmt.Fprintf(os.Stderr, "cluster %q: logs are in %s\n", name, c.Logs())
	printEnv(c)
	return nil
}

func printEnv(c *cluster.Cluster) {
	fmt.Printf("KUBECONFIG=%s\nKUBECTL=%s\n", c.Kubeconfig(), c.Kubectl())
}
