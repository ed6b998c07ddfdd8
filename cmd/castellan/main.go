// Command castellan is the operator's command: it starts a sample mesh, inspects
// certificates, explains policy decisions and checks a running mesh.
package main

import (
	"os"

	"castellan.dev/internal/cli"
)

func main() {
	os.Exit(cli.Main(os.Args, os.Stdin, os.Stdout, os.Stderr))
}
