// Package config reads the configuration files, one per binary, and says what is
// wrong with them by field path. It opens no listener and no other file than the
// one it is given.
package config

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"
)

// APIVersion is the version of every configuration file.
const APIVersion = "castellan.dev/v1alpha1"

const maxFile = 4 << 20

// Header opens every configuration file.
type Header struct {
	APIVersion string `json:"apiVersion"`
	Kind       string `json:"kind"`
}

func (h Header) check(kind string) error {
	if h.APIVersion != APIVersion {
		return fmt.Errorf("apiVersion: %q, want %q", h.APIVersion, APIVersion)
	}
	if h.Kind != kind {
		return fmt.Errorf("kind: %q, want %q", h.Kind, kind)
	}
	return nil
}

// validator is what every configuration can do; Load calls it.
type validator interface{ Validate() error }

// Load reads a YAML file into cfg, refusing unknown and duplicate fields, and
// validates it. Errors name the file and the field.
func Load(path string, cfg validator) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("config: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return fmt.Errorf("config: %w", err)
	}
	if len(data) > maxFile {
		return fmt.Errorf("config: %s is larger than %d bytes", path, maxFile)
	}
	return parse(path, data, cfg)
}

// LoadEnv does the same with the document in an environment variable.
func LoadEnv(name string, cfg validator) error {
	data, ok := os.LookupEnv(name)
	if !ok {
		return fmt.Errorf("config: environment variable %s is not set", name)
	}
	return parse("$"+name, []byte(data), cfg)
}

func parse(source string, data []byte, cfg validator) error {
	if err := Unmarshal(data, cfg); err != nil {
		return fmt.Errorf("config: %s: %w", source, err)
	}
	if err := cfg.Validate(); err != nil {
		return fmt.Errorf("config: %s: %w", source, err)
	}
	return nil
}

// Duration is a time.Duration written as Go does ("90s", "1h").
type Duration time.Duration

// UnmarshalJSON reads a Go duration string.
func (d *Duration) UnmarshalJSON(b []byte) error {
	var s string
	if err := json.Unmarshal(b, &s); err != nil {
		return errors.New(`a duration is a string such as "90s" or "1h"`)
	}
	v, err := time.ParseDuration(s)
	if err != nil {
		return err
	}
	*d = Duration(v)
	return nil
}

// MarshalJSON writes a Go duration string.
func (d Duration) MarshalJSON() ([]byte, error) { return json.Marshal(time.Duration(d).String()) }

// Or returns d, or def where d is zero.
func (d Duration) Or(def time.Duration) time.Duration {
	if d == 0 {
		return def
	}
	return time.Duration(d)
}

// Log sets up logging.
type Log struct {
	// Level is debug, info, warn or error; default info.
	Level string `json:"level,omitempty"`
	// Format is json or text; default json.
	Format string `json:"format,omitempty"`
}

func (l Log) validate() error {
	switch l.Level {
	case "", "debug", "info", "warn", "error":
	default:
		return fmt.Errorf("log.level: %q, want debug, info, warn or error", l.Level)
	}
	switch l.Format {
	case "", "json", "text":
	default:
		return fmt.Errorf("log.format: %q, want json or text", l.Format)
	}
	return nil
}
