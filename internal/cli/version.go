package cli

import (
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"
)

// Version is the release, set by the linker (-X); a build without one says so.
var Version = "dev"

func (e *env) versionCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "version", Short: "Print the version", Args: noArgs}
	format := outputFlag(cmd, "table", "json", "yaml")
	cmd.RunE = func(*cobra.Command, []string) error {
		if err := checkOutput(*format, "table", "json", "yaml"); err != nil {
			return err
		}
		v := struct {
			Version  string `json:"version"`
			Commit   string `json:"commit,omitempty"`
			Go       string `json:"go"`
			Platform string `json:"platform"`
		}{Version: Version, Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH}
		if info, ok := debug.ReadBuildInfo(); ok {
			for _, s := range info.Settings {
				if s.Key == "vcs.revision" {
					v.Commit = s.Value
				}
			}
		}
		if *format != "table" {
			return writeData(e.out, *format, v)
		}
		_, err := fmt.Fprintf(e.out, "castellan %s (%s, %s)\n", v.Version, v.Go, v.Platform)
		return err
	}
	return cmd
}
