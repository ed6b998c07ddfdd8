package main

import (
	"errors"
	"flag"
	"fmt"

	"castellan.dev/internal/config"
)

// source is where the configuration is.
type source struct{ file, env string }

func sourceFlags(flags *flag.FlagSet) *source {
	var s source
	flags.StringVar(&s.file, "config", "", "configuration `file` (kind ProxyConfig)")
	flags.StringVar(&s.env, "config-env", "", "`name` of the environment variable that holds the configuration, in place of a file")
	return &s
}

// parse takes flags and nothing else.
func parse(flags *flag.FlagSet, args []string) error {
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", flags.Arg(0))
	}
	return nil
}

func (s *source) load() (cfg config.Proxy, err error) {
	switch {
	case s.file != "" && s.env != "":
		err = errors.New("-config FILE and -config-env NAME: give one of them")
	case s.file != "":
		err = config.Load(s.file, &cfg)
	case s.env != "":
		err = config.LoadEnv(s.env, &cfg)
	default:
		err = errors.New("-config FILE or -config-env NAME is required")
	}
	return cfg, err
}
