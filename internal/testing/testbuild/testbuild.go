// Package testbuild builds the program for tests that run it.
package testbuild

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
)

const commands = "github.com/tulle-net/tulle/cmd/"

// Tulle builds cmd/tulle as path (see Command).
func Tulle(path string, env []string, flags ...string) error {
	return Command("tulle", path, env, flags...)
}

// Command builds one of the programs under cmd/ as path, with these variables besides the environment's
// and these flags of "go build".
//
// The go command keeps a test's result until the test binary or a file that the
// test has looked at changes. What the program is made of is neither, so Command
// looks at it: a test that passed with another program must run again.
func Command(name, path string, env []string, flags ...string) error {
	program := commands + name
	paths, err := sources(env, program)
	if err != nil {
		return err
	}
	for _, p := range paths {
		if _, err := os.Stat(p); err != nil {
			return err
		}
	}
	_, err = run(env, append(append([]string{"build", "-o", path}, flags...), program)...)
	return err
}

// sources lists what of this module the program is made of: files, and their
// directories for files that come.
func sources(env []string, program string) ([]string, error) {
	list, err := run(env, "list", "-deps", "-f", `{{with .Module}}{{if .Main}}{{.GoMod}}
{{$.Dir}}{{range $.GoFiles}}
{{$.Dir}}/{{.}}{{end}}{{range $.SFiles}}
{{$.Dir}}/{{.}}{{end}}{{range $.EmbedFiles}}
{{$.Dir}}/{{.}}{{end}}{{end}}{{end}}`, program)
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(strings.Split(list, "\n"), func(s string) bool { return s == "" }), nil
}

func run(env []string, args ...string) (string, error) {
	c := exec.Command("go", args...)
	c.Env = append(os.Environ(), env...)
	var stderr bytes.Buffer
	c.Stderr = &stderr
	out, err := c.Output()
	if err != nil {
		return "", fmt.Errorf("go %s: %w\n%s", args[0], err, stderr.Bytes())
	}
	return string(out), nil
}
