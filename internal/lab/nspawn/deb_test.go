package nspawn

import (
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

// packages are the built ones, by version: building one takes longer than installing it.
var packages = map[string]string{}

// packagesDir keeps them until the tests have ended.
var packagesDir string

func TestMain(m *testing.M) {
	code := m.Run()
	if packagesDir != "" {
		_ = os.RemoveAll(packagesDir)
	}
	os.Exit(code)
}

// deb is the package in a version, built with the command that users build it with.
func deb(t *testing.T, version string) string {
	t.Helper()
	if have := packages[version]; have != "" {
		return have
	}
	var err error
	if packagesDir == "" {
		if packagesDir, err = os.MkdirTemp("", "tulle-debs"); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.CommandContext(t.Context(), filepath.Join(repository, "packaging/build"), "deb", runtime.GOARCH)
	cmd.Env = append(os.Environ(), "VERSION="+version, "OUT="+packagesDir)
	cmd.Stderr = t.Output()
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("packaging/build deb: %v", err)
	}
	packages[version] = strings.TrimSpace(string(out))
	return packages[version]
}
