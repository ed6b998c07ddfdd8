package pack

import (
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
)

// machines are the platforms that images are made for.
var machines = map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64}

// checkProgram refuses a program that could not start on the platform with only
// these files beside it.
func checkProgram(file, arch string, files map[string]string) error {
	machine, ok := machines[arch]
	if !ok {
		return fmt.Errorf("platform %q: want amd64 or arm64", arch)
	}
	program, err := elf.Open(file)
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	defer func() { _ = program.Close() }() // only read
	if program.Machine != machine {
		return fmt.Errorf("%s is a program for %v, not for %s", file, program.Machine, arch)
	}
	loader, err := interpreter(program)
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	if _, there := files[path.Clean(loader)]; loader != "" && !there {
		return fmt.Errorf("%s is not static: it wants %s, which is not in the image; build with CGO_ENABLED=0", file, loader)
	}
	return nil
}

// interpreter is the dynamic loader that a program names; empty for a static one.
func interpreter(program *elf.File) (string, error) {
	for _, p := range program.Progs {
		if p.Type != elf.PT_INTERP {
			continue
		}
		if p.Filesz > 4096 {
			return "", errors.New("the name of its loader is not credible")
		}
		name, err := io.ReadAll(p.Open())
		return strings.TrimRight(string(name), "\x00"), err
	}
	return "", nil
}
